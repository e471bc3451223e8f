"""The data layer: file formats, hold-out, masks, windows, items; every error that a user can cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import HfApi
from tiny_run import byte_tokenizer

from uniattn_cli.data import builtin, items, rows, sequences, splits, windows
from uniattn_cli.errors import DataError
from uniattn_cli.recipe.schema import DatasetSpec, DataSpec, TaskSpec

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Llama 2 and Mistral: BOS in the template, no generation prompt, a blank before the answer.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
# No generation prompt although turns have headers: the header is not the model's to learn.
HEADERS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
# In the manner of reasoning models: only the last answer is rendered with a thinking block.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(template: str | None = CHATML, *, bos: bool = False, eos: str = "<|im_end|>"):
    """One token per byte, plus one merge across words and the special tokens; optionally adds BOS as Llama does."""
    specials, names = ["<s>", "<|im_start|>", "<|im_end|>"], {"bos_token": "<s>", "eos_token": eos, "pad_token": eos}
    return byte_tokenizer(specials, template, merges=["Ġ a"], bos_first=bos, **names)


def turns(*contents: str, first: str = "user") -> list[dict]:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    fixed = roles + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(fixed, contents, strict=False)]


def chat_rows(*conversations: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"messages": list(conversations)})


def pieces(tokenizer, tokenised, row: int = 0) -> list[tuple[str, bool]]:
    """Runs of learned and masked text, token by token joined."""
    ids, labels = tokenised.dataset[row]["input_ids"], tokenised.dataset[row]["labels"]
    assert len(ids) == len(labels)
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(ids, labels, strict=True):
        if not runs or runs[-1][1] != (label != -100):
            runs.append(([], label != -100))
        runs[-1][0].append(token)
    return [(tokenizer.decode(tokens), learned) for tokens, learned in runs]


def write(path: Path, *objects: object) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects), encoding="utf-8")
    return str(path)


def load(source: object, part: str = "train", holdout: float = 1e-9, seed: int = 0, **settings) -> datasets.Dataset:
    return splits.load_mix((DatasetSpec(source=str(source), **settings),), part, holdout=holdout, seed=seed).rows


# Formats

QA = turns("Why?", "Because.")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"messages": QA}, QA),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, QA[1]]}, QA),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, QA),
        ({"conversations": [{"from": "gpt", "value": "Hello"}, *QA]}, QA),
        ({"prompt": "Why?", "completion": "Because."}, QA),
        ({"prompt": [QA[0]], "completion": [QA[1]]}, QA),
        ({"instruction": "Why?", "input": "", "output": "Because."}, QA),
        ({"instruction": "Why?", "output": "Because."}, QA),
        ({"instruction": "Sum.", "input": "1, 2", "output": "3"}, turns("Sum.\n\n1, 2", "3")),
        ({"input": "Why?", "output": "Because.", "source": "x"}, QA),
    ],
)
def test_every_layout_becomes_messages(tmp_path, raw, expected):
    found = load(write(tmp_path / "a.jsonl", raw))
    assert found.column_names == ["messages"]
    assert found[0]["messages"] == expected


def test_every_file_type_gives_the_same_rows(tmp_path):
    table = [{"instruction": f"Ask {i}, please", "input": "", "output": f'Say "{i}"\nä'} for i in range(9)]
    write(tmp_path / "a.jsonl", *table)
    (tmp_path / "a.json").write_text(json.dumps(table), encoding="utf-8")
    frame = datasets.Dataset.from_list(table)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv")
    first, *others = [load(tmp_path / name)["messages"][:] for name in ("a.jsonl", "a.json", "a.parquet", "a.csv")]
    assert sorted(m[1]["content"] for m in first) == [f'Say "{i}"\nä' for i in range(9)]
    assert all(other == first for other in others)


def test_text_rows_are_paragraphs_or_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One\nstill one\n\nTwo\n \n\nThree\n", encoding="utf-8")
    assert sorted(load(path)["text"]) == ["One\nstill one", "Three", "Two"]
    path.write_text("\ufeffOne\nTwo\n", encoding="utf-8")
    assert sorted(load(path)["text"]) == ["One", "Two"]
    path.write_text("\ufeffOne\n\nTwo\n", encoding="utf-8")
    assert sorted(load(path)["text"]) == ["One", "Two"]


def test_sources_are_mixed_counted_and_limited(tmp_path):
    chat = write(tmp_path / "chat.jsonl", *({"prompt": f"p{i}", "completion": "c"} for i in range(5)))
    text = write(tmp_path / "text.jsonl", *({"text": f"t{i}"} for i in range(4)))
    specs = (DatasetSpec(source=chat), DatasetSpec(source=text, limit=3))
    mix = splits.load_mix(specs, "train", holdout=1e-9, seed=0)
    found = mix.rows
    assert Counter(mix.chosen.tolist()) == {0: 5, 1: 3} and [share.source for share in mix.shares] == [chat, text]
    assert all((row["messages"] is None) == bool(number) for row, number in zip(found, mix.chosen, strict=True))
    assert sorted(t for t in found["text"] if t) == ["t0", "t1", "t2"]
    assert sum(m is not None for m in found["messages"]) == 5
    both = sequences.tokenize(mix, make_tokenizer(), max_length=64, loss="responses")
    assert (both.counts.used, both.counts.dropped) == (8, 0)


def test_a_named_format_wins_over_detection(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": QA, "text": "plain"})
    assert load(path, format="text")["text"][0] == "plain"
    assert load(path)["messages"][0] == QA


# Hold-out


def test_holdout_is_disjoint_complete_and_independent_of_seed_and_neighbours(tmp_path):
    objects = [{"text": f"row {i}"} for i in range(400)]
    path = write(tmp_path / "a.jsonl", *objects, *objects[:50])
    parts = {part: load(path, part, holdout=0.2)["text"][:] for part in ("train", "heldout")}
    assert not set(parts["train"]) & set(parts["heldout"])
    assert len(parts["train"]) + len(parts["heldout"]) == 450  # duplicates stay, on one side
    assert 40 < len(set(parts["heldout"])) < 120
    assert load(path, "heldout", holdout=0.2, seed=5)["text"][:] == parts["heldout"]
    shuffled = load(path, "train", holdout=0.2, seed=5)["text"][:]
    assert shuffled != parts["train"] and sorted(shuffled) == sorted(parts["train"])
    fewer = load(write(tmp_path / "b.jsonl", *objects[::-1][:100]), "heldout", holdout=0.2)["text"][:]
    assert fewer == [text for text in dict.fromkeys(parts["heldout"]) if int(text.split()[1]) >= 300]


def test_holdout_is_the_same_in_every_process(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": f"row {i}"} for i in range(60)))
    code = (
        "import sys; from uniattn_cli.data import splits; from uniattn_cli.recipe.schema import DatasetSpec\n"
        "print(splits.load_mix((DatasetSpec(source=sys.argv[1]),), 'train', holdout=0.3, seed=3).rows['text'][:])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)
    assert other.stdout.strip() == str(load(path, holdout=0.3, seed=3)["text"][:]), other.stderr


def test_builtin_rows_have_their_own_holdout(monkeypatch):
    monkeypatch.setattr(builtin, "instructions", lambda part: [{"messages": turns(part, str(i))} for i in range(9)])
    monkeypatch.setattr(builtin, "text", lambda part: [f"text of {part}"])
    assert {m[0]["content"] for m in load("builtin", holdout=0.5)["messages"]} == {"train"}
    heldout = load("builtin", "heldout", limit=4)
    assert {m[0]["content"] for m in heldout["messages"]} == {"heldout"} and len(heldout) == 4
    assert load("builtin", format="text")["text"][:] == ["text of train"]
    with pytest.raises(DataError, match="no split, config or columns"):
        load("builtin", split="train")


def test_a_hub_data_set_is_loaded_by_config_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **settings):
        asked.append((arguments, settings))
        return datasets.Dataset.from_list([{"input": f"q{i}", "output": "a"} for i in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load("owner/name", config="small", split="test", limit=2)) == 2
    assert asked == [(("owner/name", "small"), {"split": "test"})]


# Errors

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
BROKEN = [
    ("a.jsonl", "", "a.jsonl has no rows"),
    ("a.json", "", "a.json has no rows"),
    ("a.json", "[]", "a.json has no rows"),
    ("a.csv", "", "a.csv has no rows"),
    ("a.txt", "\n \n", "a.txt has no rows"),
    ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
    ("a.jsonl", '{"text": "x"}\n[1]\n', "a.jsonl, line 2 must be an object"),
    ("a.json", '{"text": "x"}', "must contain a list of objects, not a dict"),
    ("a.json", '[{"text": "x"}, 3]', "a.json, row 2 must be an object"),
    ("a.json", "[{]", "a.json is not JSON"),
    ("a.csv", "instruction,output\na,b\nc\n", "a.csv, row 2 does not have exactly the columns instruction, output"),
    ("a.parquet", "no parquet", "a.parquet is not a readable parquet file"),
    *((name, LFS, f"{name} is a pointer of Git LFS") for name in ("a.parquet", "a.jsonl", "a.txt", "a.csv", "a.json")),
    ("a.xml", "<a/>", "unsupported extension '.xml'; supported are .json .jsonl"),
    ("a.jsonl", '{"question": "x", "answer": "y"}', "lacks the needed columns: .* It has: answer, question"),
    ("a.jsonl", '{"text": "x"}\n{"txt": "y"}', "a.jsonl, line 2: no column 'text' .it has: txt"),
    ("a.jsonl", '{"text": 3}', "line 1: column 'text' is int, not text"),
    ("a.jsonl", '{"instruction": "", "output": "y"}', "line 1: instruction and input are both empty"),
    ("a.jsonl", '{"instruction": "x", "output": null}', "line 1: column 'output' is null"),
    ("a.jsonl", '{"messages": []}', "line 1: column 'messages' must be a list of messages"),
    ("a.jsonl", '{"messages": ["hi"]}', "message 1 of 'messages' must have role and content"),
    ("a.jsonl", '{"messages": [{"role": "boss", "content": "x"}]}', "unknown role 'boss'"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', "message 1 of 'messages' has no text content"),
    ("a.jsonl", '{"prompt": "x", "completion": 3}', "column 'completion' must be a list of messages"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_are_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"rows.jsonl not found .looked for {tmp_path}/rows.jsonl"):
        load("rows.jsonl")
    with pytest.raises(DataError, match="not found"):
        load("./no/such/thing")
    with pytest.raises(DataError, match=rf"{tmp_path} is a folder; .* a pattern such as \*\.jsonl"):
        load(".")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        load("pipe.jsonl")
    for address in ("https://host/rows.jsonl", "s3://bucket/rows", "hf://datasets/a/b/rows.parquet"):
        with pytest.raises(DataError, match=f"{address} is an address; download it and name the file"):
            load(address)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text"):
        load("a.txt")
    write(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(DataError, match="`split`, `config` and `streaming` are for hub data sets"):
        load("a.jsonl", split="test")
    with pytest.raises(DataError, match=r"lacks the needed columns: prompt and completion\. It has: text"):
        load("a.jsonl", format="prompt_completion")


def test_a_hub_id_without_network_says_what_was_looked_for(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load("no-such-owner/no-such-set")
    for part in (f"looked for {tmp_path}/no-such-owner/no-such-set", "hub data set", "use a local file", ".jsonl"):
        assert part in str(caught.value)


@pytest.mark.parametrize("error", [ImportError("Using SOCKS proxy, but ..."), FileNotFoundError(2, "No such file")])
def test_a_client_that_cannot_be_set_up_is_no_network(error, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    with pytest.raises(DataError, match=r"'owner/rows' is not a file .*could not be loaded"):
        load("owner/rows")


def test_a_wrong_split_of_the_hub_lists_the_known_ones(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError("Unknown split \"trian\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"split trian: .*'train', 'test'"):
        load("owner/name", split="trian")


def test_a_part_without_rows_names_the_setting(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "only one"})
    with pytest.raises(DataError, match=r"no held-out rows at data.holdout 1e-09; raise data.holdout"):
        load(path, "heldout")


# Masks


def test_every_assistant_turn_is_learned_with_its_end_token():
    tokenizer = make_tokenizer()
    row = turns("Be brief.", "One?", "A first answer.", "Two?", "Second: b ä€", first="system")
    result = sequences.tokenize(chat_rows(row), tokenizer, max_length=500, loss="responses")
    assert pieces(tokenizer, result) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        ("A first answer.<|im_end|>", True),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Second: b ä€<|im_end|>", True),
        ("\n", False),
    ]
    expected = tokenizer.apply_chat_template(row, tokenize=True, return_dict=True)["input_ids"]
    assert result.dataset[0]["input_ids"] == expected


def test_a_slow_tokenizer_gets_the_same_mask(monkeypatch):
    tokenizer = make_tokenizer()
    row = chat_rows(turns("One?", "A first answer.", "Two?", "Second: ä€"))
    fast = sequences.tokenize(row, tokenizer, max_length=500, loss="responses").dataset[0]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert sequences.tokenize(row, tokenizer, max_length=500, loss="responses").dataset[0] == fast


def test_a_template_with_its_own_bos_and_no_generation_prompt():
    tokenizer = make_tokenizer(INST, bos=True)
    row = turns("One?", "a first", "Two?", "a second")
    result = sequences.tokenize(chat_rows(row), tokenizer, max_length=500, loss="responses")
    # The blank before an answer is one token with its first letter, and is learned with it.
    assert pieces(tokenizer, result) == [
        ("<s>[INST] One? [/INST]", False),
        (" a first<|im_end|>", True),
        ("[INST] Two? [/INST]", False),
        (" a second<|im_end|>", True),
    ]
    with pytest.raises(DataError, match="system, user, assistant: only user and assistant roles"):
        sequences.tokenize(chat_rows(turns("s", "u", "a", first="system")), tokenizer, max_length=99, loss="responses")


def test_headers_are_not_learned_where_the_template_has_no_generation_prompt():
    tokenizer = make_tokenizer(HEADERS)
    result = sequences.tokenize(chat_rows(turns("One?", "x y")), tokenizer, max_length=500, loss="responses")
    assert pieces(tokenizer, result)[1] == ("x y<|im_end|>", True)


def test_a_template_that_changes_earlier_turns_gives_one_sequence_per_answer():
    tokenizer = make_tokenizer(THINKING)
    single = sequences.tokenize(chat_rows(turns("One?", "x")), tokenizer, max_length=500, loss="responses")
    assert pieces(tokenizer, single)[1] == ("<think>\n\n</think>\n\nx<|im_end|>", True)
    row = turns("One?", "x", "Two?", "y")
    result = sequences.tokenize(chat_rows(row), tokenizer, max_length=500, loss="responses")
    assert (result.counts.rows, result.counts.split, result.counts.used, result.counts.dropped) == (1, 1, 2, 0)
    first, second = pieces(tokenizer, result), pieces(tokenizer, result, 1)
    assert first == pieces(tokenizer, single)
    # Each as the model sees it when it gives the answer: what it thought before is gone.
    asked = tokenizer.apply_chat_template(row[:3], tokenize=False, add_generation_prompt=True)
    assert second == [(asked, False), ("<think>\n\n</think>\n\ny<|im_end|>", True), ("\n", False)]
    whole = sequences.tokenize(chat_rows(row), tokenizer, max_length=500, loss="all")
    assert (whole.counts.used, whole.counts.split, whole.counts.share) == (1, 0, 1.0)


def test_a_base_model_without_template_gets_the_plain_form():
    tokenizer = make_tokenizer(None, bos=True)
    row = turns("Be brief.", "One?", "x", "Two?", "y", first="system")
    result = sequences.tokenize(chat_rows(row), tokenizer, max_length=500, loss="responses")
    assert pieces(tokenizer, result) == [
        ("<s>Be brief.\nOne?\n", False),
        ("x<|im_end|>", True),
        ("Two?\n", False),
        ("y<|im_end|>", True),
    ]


@pytest.mark.parametrize("bos", [False, True])
def test_text_rows_are_learned_in_full_and_end_once(bos):
    tokenizer = make_tokenizer(bos=bos)
    text = datasets.Dataset.from_dict({"text": ["ab", "<s>ab<|im_end|>"]})
    result = sequences.tokenize(text, tokenizer, max_length=500, loss="responses")
    assert pieces(tokenizer, result) == [("<s>ab<|im_end|>" if bos else "ab<|im_end|>", True)]
    assert pieces(tokenizer, result, 1) == [("<s>ab<|im_end|>", True)]
    assert result.counts.share == 1.0


@pytest.mark.parametrize("limit, lengths", [(4, [4, 4, 3]), (5, [5, 4, 2]), (11, [11]), (500, [11])])
def test_long_texts_are_divided_and_lose_nothing(limit, lengths):
    tokenizer = make_tokenizer()
    texts = datasets.Dataset.from_dict({"text": ["abcdefghij", "ab"]})
    result = sequences.tokenize(texts, tokenizer, max_length=limit, loss="responses")
    assert [len(row) for row in result.dataset["input_ids"]] == [*lengths, 3]
    whole = [token for row in result.dataset["input_ids"] for token in row]
    assert tokenizer.decode(whole) == "abcdefghij<|im_end|>ab<|im_end|>"
    assert (result.counts.rows, result.counts.divided, result.counts.split) == (2, len(lengths) - 1, 0)
    counts = result.counts
    assert (counts.tokens, counts.supervised, counts.truncated, counts.lost) == (14, 14, 0, 0)


def test_all_tokens_can_be_learned():
    tokenizer = make_tokenizer()
    result = sequences.tokenize(chat_rows(QA), tokenizer, max_length=500, loss="all")
    assert result.counts.supervised == result.counts.tokens == len(result.dataset[0]["input_ids"])


def test_truncation_and_dropping_are_counted():
    tokenizer = make_tokenizer(None)
    fits, cut, lost = turns("q", "12"), turns("q", "123456789"), turns("q" * 20, "12")
    rows = chat_rows(fits, cut, lost, turns("no answer"))
    result = sequences.tokenize(rows, tokenizer, max_length=6, loss="responses")
    assert (result.counts.rows, result.counts.used, result.counts.dropped, result.counts.truncated) == (4, 2, 2, 3)
    assert result.counts.why_dropped == (
        "1 with a prompt that fills train.max_length, 1 without an answer to learn; raise train.max_length"
    )
    assert pieces(tokenizer, result, 1) == [("q\n", False), ("1234", True)]
    assert (result.counts.tokens, result.counts.supervised) == (5 + 6, 3 + 4)
    assert result.counts.share == 7 / 11
    with pytest.raises(DataError, match=r"within its first 6 tokens: 1 with a prompt .*; raise train\.max_length$"):
        sequences.tokenize(chat_rows(lost), tokenizer, max_length=6, loss="responses")
    with pytest.raises(DataError, match=r"1 without an answer to learn; check that the rows have assistant turns$"):
        sequences.tokenize(chat_rows(turns("no answer")), tokenizer, max_length=6, loss="responses")


# Windows


def test_windows_are_the_documents_joined_by_eos():
    tokenizer = make_tokenizer()
    packed = windows.windows(["abc", "de", "f<|im_end|>", "ghijk"], tokenizer, tokens=12, length=4)
    assert packed.dtype == torch.long and packed.shape == (3, 4)
    assert tokenizer.decode(packed.flatten()) == "abc<|im_end|>de<|im_end|>f<|im_end|>ghi"


def test_windows_begin_with_bos_where_the_tokenizer_adds_one():
    tokenizer = make_tokenizer(bos=True)
    packed = windows.windows(["abc", "<s>de", "fghij"], tokenizer, tokens=15, length=4)
    assert [tokenizer.decode(window) for window in packed] == ["<s>abc", "<s><|im_end|>de", "<s><|im_end|>fg"]


def test_windows_of_conversations_are_rendered():
    tokenizer = make_tokenizer(INST, bos=True)
    packed = windows.windows(chat_rows(turns("q", "a"), turns("r", "b")), tokenizer, tokens=37, length=37)
    # The template's own BOS gives way to the one of the window; its EOS is not doubled.
    assert tokenizer.decode(packed[0]) == "<s>[INST] q [/INST] a<|im_end|>[INST] r [/INST] b"


def test_windows_run_out_and_skip():
    tokenizer = make_tokenizer()
    text = ["0123456789" * 4]
    whole = windows.windows(text, tokenizer, tokens=1000, length=8)
    assert whole.shape == (5, 8)  # 41 tokens
    later = windows.windows(text, tokenizer, tokens=8, length=8, skip=16)
    assert torch.equal(later, whole[2:3])
    assert windows.windows(text, tokenizer, tokens=4, length=8).shape == (1, 8)
    with pytest.raises(DataError, match="41 tokens, fewer than one window of 64"):
        windows.windows(text, tokenizer, tokens=64, length=64)
    with pytest.raises(DataError, match="after the first 36"):
        windows.windows(text, tokenizer, tokens=8, length=8, skip=36)
    with pytest.raises(DataError, match="no end-of-text token"):
        windows.windows(text, make_tokenizer(eos=None), tokens=8, length=8)


def local(tmp_path: Path, **sources) -> DataSpec:
    return DataSpec(**{key: (DatasetSpec(source=str(source)),) for key, source in sources.items()})


def test_calibration_takes_training_rows_and_never_heldout_ones(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    path = write(tmp_path / "a.jsonl", *({"prompt": f"q{i}", "completion": f"<{i}>"} for i in range(40)))
    spec = DataSpec(train=(DatasetSpec(source=path),), holdout=0.4)
    packed = windows.calibration_windows(spec, tokenizer, tokens=100_000, length=32, seed=0)
    seen = tokenizer.decode(packed[:, 1:].flatten())
    heldout = load(path, "heldout", holdout=0.4)["messages"]
    train = load(path, "train", holdout=0.4)["messages"]
    assert len(heldout) > 5 and not any(m[1]["content"] in seen for m in heldout)
    assert sum(m[1]["content"] in seen for m in train) >= len(train) - 1  # the last may be cut
    assert "<|im_start|>user\nq" in seen
    assert torch.equal(packed, windows.calibration_windows(spec, tokenizer, tokens=100_000, length=32, seed=0))
    assert not torch.equal(packed, windows.calibration_windows(spec, tokenizer, tokens=100_000, length=32, seed=1))


def test_calibration_data_may_be_named(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "c.txt").write_text("calibrate me\n\nand me", encoding="utf-8")
    spec = local(tmp_path, train=write(tmp_path / "a.jsonl", {"text": "t" * 99}), calibration=tmp_path / "c.txt")
    packed = windows.calibration_windows(spec, tokenizer, tokens=16, length=16, seed=0)
    assert tokenizer.decode(packed[0]) == "calibrate me\n\nand me"[: len(tokenizer.decode(packed[0]))]


def test_builtin_calibration_mixes_text_and_chat(monkeypatch):
    tokenizer = make_tokenizer(None)
    monkeypatch.setattr(builtin, "text", lambda part: [f"{part[0].upper() * 100}" for _ in range(60)])
    monkeypatch.setattr(builtin, "instructions", lambda part: [{"messages": turns("q" * 9, "r" * 9)}] * 200)
    packed = windows.calibration_windows(DataSpec(), tokenizer, tokens=4096, length=64, seed=0)
    seen = tokenizer.decode(packed.flatten())
    text, chat = seen.count("C"), seen.count("q") + seen.count("r")
    assert 1.7 < text / (chat * 1.6) < 2.5  # each 18 letters of chat are rendered with a line end and a long EOS
    heldout = windows.heldout_windows(DataSpec(), tokenizer, tokens=128, length=64)
    assert set(tokenizer.decode(heldout.flatten())) == {"H"} | set("<|im_end|>")


def test_heldout_text_keeps_its_order_and_is_not_used_elsewhere(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "t.txt").write_text("first\n\nsecond\n\nthird", encoding="utf-8")
    packed = windows.heldout_windows(local(tmp_path, text=tmp_path / "t.txt"), tokenizer, tokens=20, length=20)
    assert tokenizer.decode(packed[0]) == "first\n\nsecond\n\nthird"[:20]
    for key in ("train", "calibration"):
        spec = local(tmp_path, text=tmp_path / "t.txt", **{key: tmp_path / "t.txt"})
        with pytest.raises(DataError, match="also used for training or calibration"):
            windows.heldout_windows(spec, tokenizer, tokens=20, length=20)


def test_heldout_text_is_used_nowhere_else_under_another_name_either(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("first\n\nsecond\n\nthird", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to("t.txt")
    write(tmp_path / "a.jsonl", {"text": "x" * 99})
    monkeypatch.chdir(tmp_path)
    for text, train in (("t.txt", "*.txt"), ("*.txt", "t.txt"), ("link.txt", "t.txt"), ("t.txt", tmp_path / "t.txt")):
        with pytest.raises(DataError, match=r"data\.text: .* is also used for training or calibration"):
            windows.heldout_windows(local(tmp_path, text=text, train=train), make_tokenizer(), tokens=20, length=20)
    # What training reads needs not be there any more.
    for train in ("a.jsonl", "gone.jsonl"):
        windows.heldout_windows(local(tmp_path, text="t.txt", train=train), make_tokenizer(), tokens=20, length=20)
    same = [DatasetSpec("owner/name", split=split) for split in (None, "train")]
    with pytest.raises(DataError, match=r"data\.text: owner/name is also used"):
        spec = DataSpec(text=(same[0],), train=(same[1],))
        windows.heldout_windows(spec, make_tokenizer(), tokens=20, length=20)


# Multiple choice


def test_choices_of_a_local_file(tmp_path):
    item = {"query": "Q\nAnswer:", "choices": ["a", "b"], "gold": 1}
    assert items.read_choices(Path(write(tmp_path / "m.jsonl", {"id": 7, **item}, item))) == [
        {"id": "7", **item},
        {"id": "1", **item},
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"query": "q", "choices": ["a", "b"]}, r"line 1 lacks gold \(it has: choices, query\)"),
        ({"query": " ", "choices": ["a", "b"], "gold": 0}, "query must be text"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "choices must be a list of at least two strings"),
        ({"query": "q", "choices": ["a", 2], "gold": 0}, "choices must be a list of at least two strings"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold must be a whole number from 0 to 1, not 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "gold must be a whole number"),
    ],
)
def test_wrong_items_are_told(tmp_path, item, message):
    with pytest.raises(DataError, match=message):
        items.read_choices(Path(write(tmp_path / "m.jsonl", item)))


@pytest.mark.parametrize("target", ["NaN", "-Infinity", "null", "true", '["a", "b"]', '" "'])
def test_a_target_that_is_no_answer_is_told(tmp_path, target):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"question": "q", "target": 5}}\n{{"question": "q", "target": {target}}}\n')
    with pytest.raises(DataError, match=f"^{path}, line 2: target must be text"):
        items.load_items(TaskSpec(source=str(path)))


def test_missing_items_are_told(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl not found"):
        items.read_choices(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has no items"):
        items.read_choices(Path(write(tmp_path / "m.jsonl")))
    with pytest.raises(DataError, match=r"not a \.jsonl file"):
        items.read_choices(Path("hellaswag"))
    with pytest.raises(DataError, match=r"no task 'name_the_functoin' \(did you mean 'name_the_function'"):
        items.load_items(TaskSpec("builtin:name_the_functoin"))


def test_no_torch_is_imported_to_read_rows():
    code = "import sys, uniattn_cli.data.splits; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_whole_text_is_one_document(tmp_path):
    (tmp_path / "t.txt").write_text("a\n\nb", encoding="utf-8")
    spec = DatasetSpec(source=str(tmp_path / "t.txt"))
    assert [row["text"] for row in rows.read_rows(spec, whole_text=True)] == ["a\n\nb"]


# --- repeated passages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "repeated"), [(0, []), (1, list(range(8))), (0.25, [3, 7]), (0.5, [1, 3, 5, 7])])
@pytest.mark.parametrize("length", [6, 7])
def test_passages_are_repeated_evenly(share, repeated, length):
    rows = torch.arange(8 * length).view(8, length)
    found = windows.repeat_passages(rows, share)
    assert torch.equal(rows, torch.arange(8 * length).view(8, length))
    for index, (before, after) in enumerate(zip(rows, found, strict=True)):
        if index in repeated:
            assert torch.equal(after[:3], before[:3]) and torch.equal(after[3:6], before[:3])
            assert torch.equal(after[6:], before[6:])
        else:
            assert torch.equal(after, before)
