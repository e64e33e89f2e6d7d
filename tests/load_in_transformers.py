"""Loads saved model directories with transformers and prints their logits as JSON.

Usage: load_in_transformers.py DIRECTORY... ; each directory also holds `probe.json`, a list of
token-id sequences. A missing or unexpected weight is an error.
"""

import json
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
result = {}
for directory in sys.argv[1:]:
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            sys.exit(f"{directory}: {kind}: {info[kind]}")
    model.eval()
    with open(f"{directory}/probe.json") as file:
        sequences = json.load(file)
    with torch.no_grad():
        result[directory] = [
            model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in sequences
        ]
print(json.dumps({"versions": [transformers.__version__, torch.__version__], "logits": result}))
