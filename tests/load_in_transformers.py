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
    pad = model.config.pad_token_id
    batches = [[ids] for ids in sequences] if pad is None else [sequences]
    result[directory] = []
    for batch in batches:
        longest = max(len(ids) for ids in batch)
        padded = [ids + [pad] * (longest - len(ids)) for ids in batch]
        mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask)).logits
        result[directory] += logits.tolist()
print(json.dumps({"versions": [transformers.__version__, torch.__version__], "logits": result}))
