"""Exchanges adapters with PEFT in both directions and prints as JSON what was compared.

Usage: exchange_with_peft.py ALLREEL [START...]; ALLREEL is the binary. With STARTs only those cases
run whose name (`bert/lora_qv/to_peft`, `refused`) begins so. If anything differs: exit code 1, and
what differs in each case.

Every case is a method on a tiny random model of one family. What `allreel train` leaves must load
in PEFT, tensor by tensor and without a warning, and say the same of some texts; what PEFT saved
must say the same in `allreel predict`. LoRA is also folded in by `allreel merge`, and what that
writes must load in transformers. `allreel predict` prints four digits, so probabilities are
compared to half the last.
"""

import collections
import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import string
import subprocess
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import safetensors.torch
import tokenizers
import torch
import transformers

# Half the last printed digit, and rounding in f32: PEFT's own was up to 3.2e-7, against f64.
PRINTED = 0.5e-4 + 1e-6
# Of logits up to 3, B·A being added to the weights, not to outputs; PEFT's merge is off by 1.6e-6.
FOLDED = 1e-5
# What the adapter's own tensors must move at least: else the comparison would show little of them.
MOVED = 20 * PRINTED

TEXTS = [
    "a wonderful film, honest and moving from the first scene to the last",
    "dull",
    "the plot was clever; the ending, although brilliant, was flat and the music awful!",
    "two sisters in a small town: boring, clumsy, predictable",
]
PADS = {"roberta": 1}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHORT = {"max_position_embeddings": 66}
WIDE = SHORT | {"intermediate_size": 64}
DISENTANGLED = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
DISENTANGLED |= {"share_att_key": True, "norm_rel_ebd": "layer_norm"}
DISENTANGLED |= {"position_biased_input": False, "type_vocab_size": 0}
LOCAL = {"num_hidden_layers": 4, "local_attention": 8, "classifier_pooling": "cls"}
# What beside SHAPE makes a model; the usual targets of LoRA; modules that train whole; the module
# whose rows the head pools (GPT-2's is at the last one, virtual tokens or not).
Family = collections.namedtuple("Family", "shape usual whole rows")
FAMILIES = {
    "bert": Family(WIDE, ["query", "value"], ["layer.1.output.LayerNorm"], "bert.encoder"),
    "roberta": Family(WIDE, ["query", "value"], ["layer.1.output.dense"], "roberta.encoder"),
    "distilbert": Family(
        SHORT | {"hidden_dim": 64}, ["q_lin", "v_lin"], ["layer.1.output_layer_norm"], "distilbert"
    ),
    "deberta-v2": Family(
        WIDE | DISENTANGLED, ["query_proj", "value_proj"], ["encoder.LayerNorm"], "deberta"
    ),
    "modernbert": Family(WIDE | LOCAL, ["Wqkv"], ["head", "final_norm"], "model"),
    "gpt2": Family({"n_positions": 66}, ["c_attn"], ["ln_f"], None),
}
# PEFT 0.21 fails at DistilBERT's "all-linear": pre_classifier would train whole too.
LINEARS = {"distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]}
# Prefixes are past keys and values to PEFT, which it cannot give to the other families.
PREFIXED = ["bert", "roberta", "gpt2"]

PROMPT = {"num_virtual_tokens": 5}
NETWORK = PROMPT | {"encoder_hidden_size": 24}

# What a case is of: PEFT's class, and the keys for it and for `[adapter]`, which are the same.
Case = collections.namedtuple("Case", "family name kind keys")
METHODS = {
    peft.LoraConfig: "lora",
    peft.PromptTuningConfig: "prompt_tuning",
    peft.PromptEncoderConfig: "p_tuning",
    peft.PrefixTuningConfig: "prefix_tuning",
}


def cases_of(family):
    own, linears = FAMILIES[family], LINEARS.get(family, "all-linear")
    low_rank = {"r": 4, "lora_alpha": 8, "target_modules": own.usual}
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is this film good or bad?"}
    lora, prompt, p_tuning = peft.LoraConfig, peft.PromptTuningConfig, peft.PromptEncoderConfig
    by_mlp, by_lstm = ({"encoder_reparameterization_type": kind} for kind in ("MLP", "LSTM"))
    found = {
        "lora_qv": (lora, low_rank),
        "lora_all": (lora, low_rank | {"target_modules": linears, "bias": "lora_only"}),
        "lora_whole": (lora, low_rank | {"modules_to_save": own.whole}),
        "lora_rslora": (lora, low_rank | {"use_rslora": True, "bias": "all"}),
        "prompt_random": (prompt, PROMPT),
        "prompt_text": (prompt, PROMPT | text),
        "p_tuning_mlp": (p_tuning, NETWORK | by_mlp),
        "p_tuning_lstm": (p_tuning, NETWORK | by_lstm | {"encoder_num_layers": 2}),
    }
    if family in PREFIXED:
        found["prefix"] = (peft.PrefixTuningConfig, PROMPT)
        found["prefix_projected"] = (peft.PrefixTuningConfig, NETWORK | {"prefix_projection": True})
    return [Case(family, name, kind, keys) for name, (kind, keys) in found.items()]


def require(holds, message):
    if not holds:
        raise AssertionError(message)


class Exchange:
    """The binary, a folder, and a tiny model of each family in it."""

    def __init__(self, allreel, root):
        self.allreel, self.root = pathlib.Path(allreel).resolve(), root

    def run(self, *args):
        # An error must stay one line even where backtraces are asked for.
        own = {"ALLREEL_CACHE": str(self.root / "cache"), "RUST_BACKTRACE": "1"}
        how = {"cwd": self.root, "env": os.environ | own, "capture_output": True, "text": True}
        return subprocess.run([self.allreel, *args], **how)

    def done(self, *args):
        result = self.run(*args)
        words = " ".join(map(str, args))
        code, said = result.returncode, result.stderr.strip()
        require(code == 0, f"allreel {words}: exit code {code}: {said}")
        return result.stdout

    def base(self, family, width=SHAPE["hidden_size"]):
        """The directory of a model, made when it is first asked for."""
        directory = self.root / f"{family}-{width}"
        if not directory.is_dir():
            pad = PADS.get(family, 0)
            tokenizer = wordpieces(pad)
            shape = SHAPE | FAMILIES[family].shape | {"hidden_size": width}
            config = transformers.AutoConfig.for_model(
                family, vocab_size=len(tokenizer), pad_token_id=pad, initializer_range=0.2, **shape
            )
            torch.manual_seed(1)
            model = transformers.AutoModelForSequenceClassification.from_config(config)
            scatter(model.parameters(), 0.1)
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        return directory

    def predict(self, directory):
        """The probability of "positive" of each text, to four digits."""
        said = []
        for text in TEXTS:
            label, share = self.done("predict", directory, "--text", text).split()
            said.append(float(share) if label == "positive" else 1 - float(share))
        return torch.tensor(said, dtype=torch.float64)


def wordpieces(pad):
    """A tokenizer of letters and some of the texts' words; padding has its family's usual id."""
    pieces = ["[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    pieces.insert(pad, "[PAD]")
    names = {f"{piece.strip('[]').lower()}_token": piece for piece in pieces}
    pieces += [start + letter for letter in string.ascii_lowercase for start in ("", "##")]
    words = sorted(set(re.findall(r"\w\w+|[^\w\s]", " ".join(TEXTS))))
    vocabulary = {piece: i for i, piece in enumerate(pieces + words[::2])}
    tokenizer = tokenizers.BertWordPieceTokenizer(vocabulary)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **names)


def scatter(parameters, scale):
    """Nothing stays at the 0 or 1 that it began as, at which a mistake about it would not show."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * scale)


def load(directory):
    """A whole model, all of whose weights are in the directory."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        require(not info[kind], f"{directory}: {kind}: {info[kind]}")
    return model.eval()


def logits(model, tokenizer):
    # GPT-2 behind virtual tokens reads the last position in PEFT, were it padding.
    alone = model.config.model_type == "gpt2"
    rows = []
    for texts in [[text] for text in TEXTS] if alone else [TEXTS]:
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            rows.append(model(**batch).logits.double())
    return torch.cat(rows)


def positive(rows):
    return rows.softmax(-1)[:, 1]


def close(what, got, want, allowed):
    """The worst difference, which is allowed; NaN is not."""
    worst = (got - want).abs().max().item()
    require(worst <= allowed, f"{what}: {got.tolist()}, expected {want.tolist()} within {allowed}")
    return worst


def moved(model, tokenizer):
    """How far the adapter's own tensors move a probability; what trains whole stays as it is."""
    own = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(model).items()}
    rows = [key for key in own if "lora_B" in key or key == "prompt_embeddings"]
    inert = own | {key: torch.zeros_like(own[key]) for key in rows}
    with_it = positive(logits(model, tokenizer))
    peft.set_peft_model_state_dict(model, inert)
    by = (positive(logits(model, tokenizer)) - with_it).abs().max().item()
    peft.set_peft_model_state_dict(model, own)
    require(by >= MOVED, f"the adapter moves no probability by more than {by}")
    return by


@contextlib.contextmanager
def text_rows(model, family, count):
    """Within it the head pools the rows of the text alone: `count` virtual tokens are cut off."""
    if FAMILIES[family].rows is None:
        yield
        return

    def cut(_module, _inputs, output):
        output.last_hidden_state = output.last_hidden_state[:, count:]
        return output

    encoder = model.get_base_model().get_submodule(FAMILIES[family].rows)
    with encoder.register_forward_hook(cut):
        yield


def train(exchange, case):
    """`allreel train`; returns the run's directory."""
    run = exchange.root / f"run-{case.family}-{case.name}"
    keys = "\n".join(f"{key} = {json.dumps(value)}" for key, value in case.keys.items())
    config = run.with_suffix(".toml")
    config.write_text(
        f'[data]\ntrain = "synthetic"\nlimit = 48\nvalidation = 0.2\nmax_length = 56\n\n'
        f'[model]\npath = "{exchange.base(case.family)}"\n\n'
        f'[adapter]\nmethod = "{METHODS[case.kind]}"\n{keys}\n\n'
        f"[train]\nepochs = 3\nbatch_size = 4\nlearning_rate = 2e-2\n\n"
        f'[run]\ndir = "{run}"\nthreads = 1\n'
    )
    exchange.done("train", config)
    return run


def load_adapter(base, directory, knows_pool=True):
    """PEFT's own loading, all of whose complaints count but one about our key `pool`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        model = peft.PeftModel.from_pretrained(load(base), directory).eval()
    for message in (str(warning.message) for warning in said):
        about_pool = "Unexpected keyword arguments ['pool'] " in message
        require(about_pool and not knows_pool, f"PEFT warns: {message}")
    file = without_copies(safetensors.torch.load_file(directory / "adapter_model.safetensors"))
    own = without_copies(peft.get_peft_model_state_dict(model))
    require(file.keys() == own.keys(), f"keys differ: {sorted(file.keys() ^ own.keys())}")
    for key, tensor in file.items():
        require(torch.equal(tensor, own[key]), f"PEFT did not load {key}")
    return model


def without_copies(tensors):
    """Without those of biases of what trains whole that PEFT writes where bias = "all"."""
    copies = (".original_module.", ".modules_to_save.")
    return {key: value for key, value in tensors.items() if not any(c in key for c in copies)}


def merged(exchange, directory, tokenizer, want):
    """Folds LoRA in, and holds the whole model that comes of it to what PEFT computes."""
    out = directory.with_name(f"merged-{directory.name}")
    exchange.done("merge", directory, "--out", out)
    return close("merged", logits(load(out), tokenizer), want, FOLDED)


def to_peft(exchange, case):
    prompts = case.kind in (peft.PromptTuningConfig, peft.PromptEncoderConfig)
    by_default = case.name == "prompt_random"
    if prompts and not by_default:
        case = case._replace(keys=case.keys | {"pool": "first_position"})
    run = train(exchange, case)
    model = load_adapter(exchange.base(case.family), run / "best", knows_pool=not prompts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "best")
    found = {"moved": moved(model, tokenizer)}
    if by_default:
        return found | pooled_by_default(exchange, case, run, model, tokenizer)
    rows = logits(model, tokenizer)
    found["printed"] = close("predict", exchange.predict(run), positive(rows), PRINTED)
    if case.kind is peft.LoraConfig:
        found["merged"] = merged(exchange, run, tokenizer, rows)
    return found


def pooled_by_default(exchange, case, run, model, tokenizer):
    """Without the key `pool` a run reads the text's own first row; PEFT, and so a file without it,
    the first of all."""
    with text_rows(model, case.family, PROMPT["num_virtual_tokens"]):
        own = positive(logits(model, tokenizer))
    theirs = positive(logits(model, tokenizer))
    printed = close("first_token", exchange.predict(run), own, PRINTED)
    apart = (own - theirs).abs().max().item()
    differs = FAMILIES[case.family].rows is not None
    require((apart >= MOVED) == differs, f"the two rows are {apart} apart")
    file = run / "best" / "adapter_config.json"
    config = json.loads(file.read_text())
    require(config.pop("pool") == "first_token", "adapter_config.json has another default")
    file.write_text(json.dumps(config))
    close("no key pool", exchange.predict(run / "best"), theirs, PRINTED)
    return {"printed": printed, "apart": apart}


def from_peft(exchange, case):
    base = exchange.base(case.family)
    directory = exchange.root / f"peft-{case.family}-{case.name}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    keys = case.keys
    if keys.get("prompt_tuning_init") == "TEXT":
        keys = keys | {"tokenizer_name_or_path": str(base)}
    if case.family == "distilbert" and case.kind is not peft.LoraConfig:
        # PEFT does not find these in this family's config.
        keys = keys | {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(2)
    model = peft.get_peft_model(load(base), case.kind(task_type="SEQ_CLS", **keys)).eval()
    scatter((p for p in model.parameters() if p.requires_grad), 0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    found = {"moved": moved(load_adapter(base, directory), tokenizer)}
    rows = logits(model, tokenizer)
    found["printed"] = close("predict", exchange.predict(directory), positive(rows), PRINTED)
    if case.kind is peft.LoraConfig:
        found["merged"] = merged(exchange, directory, tokenizer, rows)
    return found


def refused(exchange):
    """Adapters that do not fit: exit code 2 and one line that says what is wrong."""
    base, wider = exchange.base("bert"), {"base_model_name_or_path": str(exchange.base("bert", 48))}
    shapes = "query.lora_A.weight is [4, 32], and the model needs [4, 48]"
    said = {}
    for name, keys, changed, reason in (
        ("another model", {}, wider, shapes),
        ("DoRA", {"use_dora": True}, {}, "use_dora = true"),
        ("no such module", {}, {"target_modules": ["q_proj"]}, "target_modules (q_proj)"),
    ):
        directory = exchange.root / f"refused-{name.replace(' ', '-')}"
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], **keys)
        peft.get_peft_model(load(base), config).save_pretrained(directory)
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
        result = exchange.run("predict", directory, "--text", TEXTS[0])
        output, lines = result.stdout + result.stderr, result.stderr.splitlines()
        alone = len(lines) == 1 and not result.stdout and reason in output
        require(result.returncode == 2 and alone, f"{name}: {result.returncode}: {output}")
        said[name] = lines[0]
    return said


def checks():
    yield "refused", refused
    for case in itertools.chain.from_iterable(map(cases_of, FAMILIES)):
        for way in (to_peft, from_peft):
            yield f"{case.family}/{case.name}/{way.__name__}", functools.partial(way, case=case)


def main(allreel, starts):
    # Those of PEFT about what it loads are caught where it does.
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    compared, wrong = {}, []
    with tempfile.TemporaryDirectory() as root:
        exchange = Exchange(allreel, pathlib.Path(root).resolve())
        for name, check in checks():
            if starts and not name.startswith(tuple(starts)):
                continue
            try:
                compared[name] = check(exchange)
            except Exception as error:  # Whatever one case dies of, the others still say theirs.
                wrong.append(f"{name}: {type(error).__name__}: {error}")
    versions = [peft.__version__, transformers.__version__, torch.__version__]
    print(json.dumps({"versions": versions, "compared": compared}, indent=1))
    if wrong or not compared:
        sys.exit("\n".join(wrong) or "no case has a name that begins so")


main(sys.argv[1], sys.argv[2:])
