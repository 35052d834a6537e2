"""Names of GGUF files: the naming convention, and how the Hugging Face Hub reads them."""

from __future__ import annotations

import re

import gguf

MAX_STEM_BYTES = 200  # of a default name before the file type; with shard number and temporary suffix below 255

# The names the Hub looks for, in its order: a regular expression takes the first alternative that fits.
HUB_LABELS = (
    *("F32", "F16", "Q4_0", "Q4_1", "Q4_1_SOME_F16", "Q4_2", "Q4_3", "Q8_0", "Q5_0", "Q5_1", "Q2_K"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S"),
    *("IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16"),
    *("Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0"),
    *("Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL", "MXFP4"),
)
_LABEL = re.compile(rf"(?:UD-)?(?:{'|'.join(HUB_LABELS)})(?:_[A-Z]+)?")
_REPO_ID = re.compile(r"(?!.*(?:--|\.\.))(?!.*\.git$)\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_NOT_A_FILE_TYPE = ("MXFP4", "Q2_K_XL", "Q3_K_XL", "Q4_K_XL", "Q5_K_XL", "Q6_K_XL", "Q8_K_XL")  # names of releases


def is_repo_id(text: str) -> bool:
    """Whether the Hub takes this for the id of a repository, with its owner: org/name."""
    return _REPO_ID.fullmatch(text) is not None


def hub_labels(file_name: str) -> list[str]:
    """Every quantization label that the Hub finds in a file name; it takes the last."""
    return _LABEL.findall(file_name.upper())


def default_file_name(
    name: str | None,
    basename: str | None,
    finetune: str | None,
    version: str | None,
    size_label: str | None,
    file_type: str,
) -> str:
    """Base-SizeLabel-FineTune-Version-FILETYPE.gguf, read by the Hub as that file type whatever the parts hold.

    Parts come from a model card, so they may hold anything. Those that are a label themselves are left out, characters
    that are awkward in a file name become dashes, and what is too long is cut before the file type, not in it.
    """
    stem = gguf.naming_convention(name, basename, finetune, version, size_label, None)
    stem = re.sub(r"[^\w.+-]+", "-", stem)
    kept = [part for part in stem.split("-") if part and not _LABEL.fullmatch(part.upper())]
    stem = "-".join(kept).encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip("-.") or "model"
    # Behind "...ud" a dash would make the label UD-Q4_K_M to the Hub: a prefix that one publisher uses.
    return f"{stem}{'.' if stem.lower().endswith('ud') else '-'}{file_type}.gguf"


def name_warnings(file_name: str, file_type: str | None) -> list[str]:
    """What the Hub would misread in a file name. `file_type`: the one that the file itself names, where it does."""
    stem = _SHARD.sub("", file_name.removesuffix(".gguf"))
    labels = hub_labels(stem)
    if not file_name.endswith(".gguf"):
        return [f"{file_name}: the Hub takes no file for GGUF whose name does not end in .gguf"]
    if not labels:
        return [f"{file_name}: the Hub finds no quantization in the name; expected one at its end, as -Q4_K_M.gguf"]
    warnings = []
    label = labels[-1]
    if len(others := dict.fromkeys(labels)) > 1:
        warnings.append(
            f"{file_name}: names {len(others)} quantizations, {' and '.join(others)}; the Hub takes {label}"
        )
    if not stem.upper().endswith(label):
        rest = stem[stem.upper().rindex(label) + len(label) :]
        warnings.append(f"{file_name}: {rest!r} stands behind the quantization, where only a shard number belongs")
    plain = label.removeprefix("UD-")
    if file_type is not None and plain != file_type and plain not in _NOT_A_FILE_TYPE:
        warnings.append(f"{file_name}: the Hub reads {label}, but the file says {file_type}")
    return warnings
