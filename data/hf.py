"""What data/from_hf.py and data/to_hf.py share: a GPT-2 as Hugging Face's transformers keeps it.

A folder holds config.json, model.safetensors (or several, listed in model.safetensors.index.json), and the tokenizer:
vocab.json and merges.txt, or tokenizer.json. The weights of linear layers are stored (in, out), llm.c's are (out, in);
wte has no padding rows; the output head is wte, and not stored.
"""

import json
from itertools import pairwise
from pathlib import Path

from llmc.checkpoint import GPT2Config, check_config
from llmc.errors import UserError
from llmc.files import open_file
from llmc.tokenizer import ENDOFTEXT, Tokenizer, characters

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
VOCAB, MERGES, TOKENIZER, TOKENIZER_CONFIG = "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
PADDED = "padded_vocab_size"  # our field of config.json, by which a model comes back with the rows that it had
MAX_JSON = 1 << 28  # bytes

NAMES = {  # llm.c's name: transformers', of one layer where it begins with "h."
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "ln1w": "h.{}.ln_1.weight",
    "ln1b": "h.{}.ln_1.bias",
    "qkvw": "h.{}.attn.c_attn.weight",
    "qkvb": "h.{}.attn.c_attn.bias",
    "attprojw": "h.{}.attn.c_proj.weight",
    "attprojb": "h.{}.attn.c_proj.bias",
    "ln2w": "h.{}.ln_2.weight",
    "ln2b": "h.{}.ln_2.bias",
    "fcw": "h.{}.mlp.c_fc.weight",
    "fcb": "h.{}.mlp.c_fc.bias",
    "fcprojw": "h.{}.mlp.c_proj.weight",
    "fcprojb": "h.{}.mlp.c_proj.bias",
    "lnfw": "ln_f.weight",
    "lnfb": "ln_f.bias",
}
TRANSPOSED = ("qkvw", "attprojw", "fcw", "fcprojw")
PREFIX = "transformer."  # of all names in a GPT2LMHeadModel; a GPT2Model has none

SIZES = {"maxT": "n_positions", "V": "vocab_size", "L": "n_layer", "NH": "n_head", "C": "n_embd"}
ALLOWED = {  # what computes a GPT-2 as ours does; the first is transformers' default
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def padded(V: int) -> int:
    """Rows of wte for V tokens, as llm.c pads them."""
    return -(-V // 128) * 128


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError for anything else."""
    with open_file(path) as file:
        try:
            content = json.loads(file.read(MAX_JSON))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: no JSON: {error}", "download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: {type(content).__name__}, expected a JSON object", "download it again")
    return content


def read_sizes(path: Path) -> tuple[GPT2Config, dict]:
    """The sizes in a config.json, and all that is in it. Raises UserError naming the field that is not a GPT-2's."""
    settings = read_json(path)
    hint = "only GPT-2 (model_type gpt2, GPT2LMHeadModel) can be converted"
    if settings.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {settings.get('model_type')!r}, expected 'gpt2'", hint)
    for field, allowed in ALLOWED.items():
        if (found := settings.get(field, allowed[0])) not in allowed:
            raise UserError(f"{path}: {field} is {found!r}, expected {' or '.join(map(repr, allowed))}", hint)
    sizes = {}
    for name, field in SIZES.items():
        sizes[name] = settings.get(field)
        if type(sizes[name]) is not int:
            raise UserError(f"{path}: {field} is {sizes[name]!r}, expected a whole number", hint)
    inner = settings.get("n_inner")
    if inner not in (None, 4 * sizes["C"]):
        raise UserError(f"{path}: n_inner is {inner!r}, expected null or 4 n_embd, {4 * sizes['C']}", hint)
    Vp = settings.get(PADDED, padded(sizes["V"]))
    if type(Vp) is not int:
        raise UserError(f"{path}: {PADDED} is {Vp!r}, expected a whole number", hint)
    config = GPT2Config(**sizes, Vp=Vp)
    check_config(config, path, "maxT is n_positions, V vocab_size, L n_layer, NH n_head, C n_embd")
    return config, settings


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer


class NoTokenizer(Exception):
    """Why tokenizer files cannot be converted; the model can be without."""


def merges_of(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """The byte pair merges that make the tokens, in the order of their ids.

    Each token falls apart into two by the merges before it. Raises NoTokenizer if one does not: then the file is none
    of byte pair encoding.
    """
    ranks, merges = tokenizer.ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [token[i : i + 1] for i in range(len(token))]
            while True:
                pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
                if not pairs or (best := min(pairs)) >= rank:
                    break
                i = pairs.index(best)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) != 2:
                raise NoTokenizer(f"token {rank}, {token!r}, is not made by a merge of two tokens before it")
            merges.append((parts[0], parts[1]))
    return merges


def tokenizer_files(tokenizer: Tokenizer, maxT: int) -> dict[str, str]:
    """The contents of vocab.json, merges.txt and tokenizer_config.json. Raises NoTokenizer if they cannot say it."""
    char_of = {byte: char for char, byte in characters().items()}

    def spelt(token: bytes) -> str:
        return "".join(char_of[byte] for byte in token)

    special = tokenizer.tokens[tokenizer.eot] == ENDOFTEXT.encode()  # a single byte could not be told from text
    vocab = {
        ENDOFTEXT if special and i == tokenizer.eot else spelt(token): i for i, token in enumerate(tokenizer.tokens)
    }
    if len(vocab) < tokenizer.vocab_size:
        raise NoTokenizer("two of its tokens are equal")
    merges = "".join(f"{spelt(a)} {spelt(b)}\n" for a, b in merges_of(tokenizer))
    end = ENDOFTEXT if special else None
    settings = dict(tokenizer_class="GPT2Tokenizer", model_max_length=maxT, add_prefix_space=False)
    settings |= dict(bos_token=end, eos_token=end, unk_token=end)
    return {
        VOCAB: json.dumps(vocab, ensure_ascii=False),
        MERGES: "#version: 0.2\n" + merges,
        TOKENIZER_CONFIG: json.dumps(settings, indent=2) + "\n",
    }


def read_tokenizer(folder: Path, settings: dict) -> Tokenizer:
    """The tokenizer beside a model; settings: its config.json, which names the end of a text.

    Raises NoTokenizer if there is none, or none that splits as GPT-2's and merges in the order of the ids.
    """
    try:
        vocab, merges = _read_vocab(folder)
        byte_of, tokens = characters(), {}
        for spelling, i in vocab.items():
            known = all(char in byte_of for char in spelling)
            tokens[i] = bytes(byte_of[char] for char in spelling) if known else spelling.encode()
        if sorted(tokens) != list(range(len(vocab))) or not all(1 <= len(token) <= 255 for token in tokens.values()):
            raise NoTokenizer(f"its {len(vocab)} ids are not 0 and on, or a token is not of 1 to 255 bytes")
        end = settings.get("eos_token_id")
        end = end if type(end) is int and end in tokens else vocab.get(ENDOFTEXT, len(vocab) - 1)
        tokenizer = Tokenizer([tokens[i] for i in range(len(vocab))], end, str(folder))
        if [tuple(bytes(byte_of[char] for char in part) for part in merge) for merge in merges] != merges_of(tokenizer):
            raise NoTokenizer("its merges do not go with the order of its ids")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NoTokenizer(f"{type(error).__name__}: {error}") from None
    return tokenizer


def _read_vocab(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of all tokens as they are spelt, and the merges. Any wrong type in the files raises what it raises."""
    if (folder / VOCAB).exists() and (folder / MERGES).exists():
        with open_file(folder / MERGES) as file:
            lines = file.read(MAX_JSON).decode().split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        return read_json(folder / VOCAB), [tuple(line.split(" ")) for line in lines if line]
    if not (folder / TOKENIZER).exists():
        raise NoTokenizer(f"there is no {VOCAB} with {MERGES}, nor {TOKENIZER}")
    content = read_json(folder / TOKENIZER)
    model, split = content["model"], content.get("pre_tokenizer") or {}
    kinds = dict(model=model["type"], pre_tokenizer=split.get("type"), use_regex=split.get("use_regex", True))
    kinds |= dict(normalizer=content.get("normalizer"), add_prefix_space=split.get("add_prefix_space"))
    expected = dict(model="BPE", pre_tokenizer="ByteLevel", use_regex=True, normalizer=None, add_prefix_space=False)
    for name, value in expected.items():
        if kinds[name] != value:
            raise NoTokenizer(f"{TOKENIZER}: {name} is {kinds[name]!r}, expected {value!r}")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return model["vocab"] | added, merges
