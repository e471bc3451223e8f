"""Loading the tokenizer of a model, and whether the two belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uniattn_cli.errors import ModelError
from uniattn_cli.models.building import BESIDE_TOKENIZER, TOKENIZER_FILES, converted_classes
from uniattn_cli.models.families import is_converted
from uniattn_cli.models.hub import Source, fetch
from uniattn_cli.models.loading import NONSENSE, last_line, read_config
from uniattn_cli.models.text_part import language_settings
from uniattn_cli.run.files import check_not_pointer, taken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to a model.

    Args:
        source: result of `locate`; weights of hub models are not downloaded.

    Raises:
        ModelError: the directory holds none, a damaged one, or one with more tokens than the model knows.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    raw = read_config(source.path)
    if is_converted(raw["model_type"]):
        # Tokenizers are chosen by the configuration; unless it is ours, the user is asked to trust the copied code.
        converted_classes(raw["model_type"])
    path = fetch(source, weights=False)
    found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not found:
        raise ModelError(f"{source.name} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    beside = [path / name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER, "chat_template.json")]
    for file in (*beside, *path.glob("*.jinja"), *path.glob("*/*.jinja")):
        if taken(file):
            check_not_pointer(file, ModelError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer("a")  # some settings are used only now
    except Exception as error:
        # The library for tokenizer.json has no class for its errors.
        if type(error) is not Exception and not isinstance(error, (OSError, StrictDataclassError, *NONSENSE)):
            raise
        raise ModelError(f"{source.name}: the tokenizer cannot be loaded: {last_line(error)}") from None
    if isinstance(tokenizer.chat_template, str):  # the byte order mark of a file is no part of its text
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    known = language_settings(raw).get("vocab_size")
    if isinstance(known, int):
        _check_vocabulary(source, tokenizer, known)
    return tokenizer


def _check_vocabulary(source: Source, tokenizer: PreTrainedTokenizerBase, known: int) -> None:
    """Rejects a tokenizer whose texts would have tokens that the model has no embeddings for.

    Args:
        known: embeddings of the model.
    """
    if tokenizer.vocab_size > known:
        raise ModelError(
            f"{source.name}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {known}; give the model "
            "its own tokenizer"
        )
    # Some published models have one more added token than embeddings, and never use it.
    beyond = {str(token): place for place, token in tokenizer.added_tokens_decoder.items() if place >= known}
    roles = {getattr(tokenizer, role): f"is its {role}" for role in ("bos_token", "eos_token", "pad_token")}
    for token, place in beyond.items():
        use = roles.get(token) or ("is in its chat template" if token in str(tokenizer.chat_template) else None)
        if use:
            raise ModelError(
                f"{source.name}: the tokenizer's token '{token}' (number {place}) {use}, but the model has only "
                f"{known} embeddings; resize them (resize_token_embeddings) or choose another token"
            )
