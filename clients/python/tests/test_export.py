"""The parts of `export` that need no torch. tests_torch has the others."""

import json
import math
import struct
import subprocess
import sys
import tempfile
import unittest
from array import array
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from scorer_client.cli import parser
from scorer_client.export import documents, rows, safetensors_file, scorer, shards, staging, token_file
from scorer_client.export.arguments import model_name, request
from scorer_client.export.closing import next_commands, readable
from scorer_client.export.command import aliases
from scorer_client.export.documents import Split
from scorer_client.export.examples import NOT_COUNTED, continued, masked, paired
from scorer_client.export.held_out import is_held_out
from scorer_client.export.package import Package, globs, matches
from scorer_client.export.precision import Precision
from scorer_client.export.proof import Comparison, Proof
from scorer_client.export.rows import Cut
from scorer_client.export.safetensors_file import NotSafetensors, Tensor
from scorer_client.export.steps import USAGE, Problem, Steps, described
from scorer_client.export.tasks import Task, task_of, window_limit, window_of
from scorer_client.export.windows import starts

MODEL = Path(__file__).resolve().parents[3] / "tests/model"


class Letters:
    """A tokenizer whose tokens are the bytes of the text, after the special ones."""

    special = {"eos": 0, "cls": 1, "sep": 2, "mask": 3, "pad": 4}

    def encode(self, text):
        return [5 + byte for byte in text.encode()]


class InFolder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def file(self, name, contents):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        return path

    def problem(self, call, *arguments):
        with self.assertRaises(Problem) as raised:
            call(*arguments)
        self.assertTrue(raised.exception.advice)
        return str(raised.exception)


class Arguments(InFolder):
    def parsed(self, *words):
        return parser().parse_args(["export", "model", "--out", str(self.folder / "out"), "--shards", str(self.folder), *words])

    def test_the_defaults_are_those_of_the_documentation(self):
        asked = request(self.parsed())
        self.assertEqual((asked.model, asked.version, asked.max_windows, asked.held_out), ("model", 1, 256, 1.0))
        self.assertEqual((asked.precision, asked.provider, asked.window, asked.task), (Precision.FLOAT32, "cpu", None, None))

    def test_wrong_values_exit_with_64_and_name_the_option(self):
        for words in (
            ["--held-out", "0"], ["--held-out", "1.5"], ["--window", "0"], ["--stride", "x"], ["--max-windows", "-1"],
            ["--dtype", "float64"], ["--task", "own"], ["--provider", "tpu"],
        ):  # fmt: skip
            said = StringIO()
            with self.subTest(words), redirect_stderr(said), self.assertRaises(SystemExit) as ended:
                self.parsed(*words)
            self.assertEqual(ended.exception.code, USAGE)
            self.assertIn(words[0], said.getvalue())

    def test_a_name_that_queues_cannot_carry_is_refused(self):
        self.assertIn("--name My Model", self.problem(request, self.parsed("--name", "My Model")))

    def test_bfloat16_on_the_cpu_is_refused_before_anything_is_done(self):
        self.assertIn("--compute-float32", self.problem(request, self.parsed("--dtype", "bfloat16")))
        for words in (["--compute-float32"], ["--provider", "cuda"]):
            self.assertEqual(request(self.parsed("--dtype", "bfloat16", *words)).precision, Precision.BFLOAT16)

    def test_files_that_exist_are_not_overwritten(self):
        there = self.file("there", "")
        for option in ("--rest", "--candidate"):
            self.assertIn(option, self.problem(request, self.parsed(option, str(there))))

    def test_any_directory_gives_a_name(self):
        for text, name in (("Llama-3.2 1B", "llama-3-2-1b"), ("_x_", "x"), ("äö", "model"), ("a" * 70, "a" * 64)):
            self.assertEqual(model_name(text), name)

    def test_the_other_commands_still_need_a_model(self):
        done = subprocess.run([sys.executable, "-m", "scorer_client", "status"], capture_output=True, text=True)
        self.assertEqual(done.returncode, USAGE)
        self.assertIn("--model is required", done.stderr)


class Command(InFolder):
    """The command itself, where torch is missing or the arguments are wrong."""

    def export(self, *words):
        blocked = "import sys; sys.modules['torch'] = None; from scorer_client.cli import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.run([sys.executable, "-c", blocked, "export", *map(str, words)], capture_output=True, text=True)

    def test_without_torch_it_says_what_to_install_and_leaves_nothing(self):
        text = self.file("text/a.txt", "words")
        done = self.export("model", "--out", self.folder / "out", "--shards", text)
        self.assertEqual(done.returncode, 69)
        self.assertIn('the step "finding torch, transformers and scorer" failed: torch cannot be imported', done.stderr)
        self.assertIn("What to do: pip install 'scorer-client[export]'", done.stderr)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["text"])

    def test_an_existing_destination_is_refused_first(self):
        done = self.export("model", "--out", self.folder, "--shards", self.folder)
        self.assertEqual(done.returncode, USAGE)
        self.assertIn(f"--out {self.folder} exists already", done.stderr)
        self.assertIn("What to do: give another directory", done.stderr)


class StepsAndProblems(unittest.TestCase):
    def failing(self, error, advice="look"):
        with redirect_stderr(StringIO()), self.assertRaises(Problem) as raised, Steps().step("cutting", advice):
            raise error
        return raised.exception

    def test_a_foreign_error_gets_the_step_and_its_advice(self):
        problem = self.failing(KeyError("x"))
        self.assertEqual(str(problem), "the step \"cutting\" failed: KeyError: 'x'\n  What to do: look")

    def test_a_problem_keeps_its_own_advice_and_exit_code(self):
        problem = self.failing(Problem("no", "do this", USAGE))
        self.assertEqual((str(problem), problem.code), ('the step "cutting" failed: no\n  What to do: do this', USAGE))

    def test_interruptions_are_no_failures(self):
        for kind in (KeyboardInterrupt, SystemExit):
            with redirect_stderr(StringIO()), self.assertRaises(kind), Steps().step("cutting", "look"):
                raise kind

    def test_pages_of_a_foreign_error_become_its_first_line_and_its_cause(self):
        try:
            try:
                raise ValueError("the \x1b[96mreason\x1b[0m\nmore")
            except ValueError as cause:
                raise RuntimeError("\nfailed\npages") from cause
        except RuntimeError as error:
            self.assertEqual(described(error), "RuntimeError: failed (caused by ValueError: the reason)")
        self.assertEqual(described(MemoryError()), "MemoryError")

    def test_the_times_of_the_steps_are_kept(self):
        steps = Steps()
        with redirect_stderr(StringIO()) as said, steps.step("cutting", "look"):
            pass
        self.assertEqual(list(steps.seconds), ["cutting"])
        self.assertTrue(said.getvalue().startswith("cutting ...\n"))


class Tasks(unittest.TestCase):
    def test_the_class_in_the_configuration_tells_the_task(self):
        for name, task in (
            ("LlamaForCausalLM", Task.CAUSAL_LM), ("GPT2LMHeadModel", Task.CAUSAL_LM), ("BertForMaskedLM", Task.MASKED_LM),
            ("T5ForConditionalGeneration", Task.SEQ2SEQ), ("ViTForImageClassification", Task.IMAGE_CLASSIFICATION),
        ):  # fmt: skip
            self.assertEqual(task_of({"architectures": [name]}), task)
        self.assertEqual(task_of({}), Task.CAUSAL_LM)

    def test_another_class_is_refused_with_both_ways_out(self):
        with self.assertRaises(Problem) as raised:
            task_of({"architectures": ["BertForSequenceClassification"]})
        self.assertIn("BertForSequenceClassification", str(raised.exception))
        self.assertIn("--task", raised.exception.advice)
        self.assertIn("package.module:function", raised.exception.advice)

    def test_only_the_causal_model_leaves_the_loss_to_the_worker(self):
        for task in Task:
            self.assertEqual(task.objective, "causal_lm" if task is Task.CAUSAL_LM else "graph_loss")

    def test_the_window_is_at_most_what_the_model_reads(self):
        self.assertEqual(window_limit({"max_position_embeddings": 64, "n_positions": 96}), 64)
        self.assertIsNone(window_limit({"n_positions": 512, "relative_attention_num_buckets": 32}))
        self.assertIsNone(window_limit({"max_position_embeddings": -1}))
        self.assertEqual([window_of(None, limit) for limit in (None, 64, 4096)], [128, 64, 128])
        self.assertEqual(window_of(64, 64), 64)
        with self.assertRaises(Problem) as raised:
            window_of(65, 64)
        self.assertIn("set --window 64 or less", raised.exception.advice)


class HeldOut(unittest.TestCase):
    def test_the_choice_is_the_documents_own_and_about_the_share(self):
        texts = [f"document {number}".encode() for number in range(2000)]
        chosen = {text for text in texts if is_held_out(text, 0.1)}
        self.assertEqual(chosen, {text for text in reversed(texts) if is_held_out(text, 0.1)})
        self.assertTrue(120 < len(chosen) < 280, len(chosen))
        self.assertLess(chosen, {text for text in texts if is_held_out(text, 0.5)})
        self.assertTrue(all(is_held_out(text, 1.0) for text in texts))

    def test_it_is_the_rule_of_the_documentation(self):
        # SHA-256 of the empty text begins with e3b0c442.
        self.assertTrue(is_held_out(b"", 0xE3B0C443 / 2**32))
        self.assertFalse(is_held_out(b"", 0xE3B0C442 / 2**32))


class Documents(InFolder):
    def test_text_that_is_all_held_out_stays_as_it_is(self):
        text = "one\ntwo\n\n\nthree\n \nfour\n"
        corpus = documents.read(self.file("a.txt", text), Split())
        self.assertEqual((corpus.texts, corpus.documents, corpus.held_out), ([text], 3, 3))

    def test_held_out_documents_and_the_rest_are_all_documents(self):
        text = "\n\n".join(f"paragraph {number}" for number in range(100))
        corpus = documents.read(self.file("a.txt", text), Split(fraction=0.3, keep_rest=True))
        self.assertEqual(corpus.held_out + len(corpus.rest), 100)
        held = {part for part in corpus.texts[0].split("\n\n") if part}
        self.assertEqual(held, {f"paragraph {n}" for n in range(100) if is_held_out(f"paragraph {n}".encode(), 0.3)})
        self.assertTrue(held.isdisjoint(line["text"].strip() for line in corpus.rest))

    def test_lines_of_json_are_documents_or_pairs(self):
        lines = '{"text": "a"}\n\n{"text": "b"}\n'
        self.assertEqual(documents.read(self.file("a.jsonl", lines), Split()).texts, ["a", "b"])
        pairs = documents.read(self.file("b.jsonl", '{"source": "a", "target": "b"}\n'), Split())
        self.assertEqual(pairs.pairs, [("a", "b")])

    def test_the_rest_of_lines_is_what_they_were(self):
        lines = [{"text": f" {number} "} for number in range(20)]
        written = self.file("a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        found = documents.read(written, Split(fraction=0.5, keep_rest=True))
        self.assertEqual(found.rest, [line for line in lines if not is_held_out(line["text"].strip().encode(), 0.5)])
        self.assertEqual(len(found.rest) + len(found.texts), 20)

    def test_what_cannot_be_read_is_told_with_its_place(self):
        for name, contents, said in (
            ("a.jsonl", '{"text": "a"}\nx\n', "line 2"), ("b.jsonl", '{"words": 1}', "line 1 has neither"),
            ("c.txt", b"\xff\xfe", "not UTF-8"), ("d.txt", " \n\n", "none of the 0 documents"),
        ):  # fmt: skip
            self.assertIn(said, self.problem(documents.read, self.file(name, contents), Split()))

    def test_a_directory_is_read_in_the_order_of_names_without_hidden_files(self):
        for name in ("b/2.txt", "a.txt", ".git/x.txt", ".hidden"):
            self.file(f"dir/{name}", name)
        self.assertEqual(documents.read(self.folder / "dir", Split()).texts, ["a.txt", "b/2.txt"])
        self.file("dir/tokens.bin", b"\1\0")
        self.assertIn("text and tokens", self.problem(documents.read, self.folder / "dir", Split()))

    def test_an_empty_directory_is_refused(self):
        (self.folder / "dir").mkdir()
        self.assertIn("holds no files", self.problem(documents.read, self.folder / "dir", Split()))

    def test_ready_shards_are_checked_where_they_are(self):
        def shard(name, shape):
            path = self.folder / name
            tensors = {"x": safetensors_file.Tensor("F32", shape, bytes(4 * math.prod(shape)))} if shape else {}
            safetensors_file.write(path, tensors)
            return [path]

        shards.check(shard("shard_1.safetensors", (2, 3)))
        for said, paths in (
            ("no number", shard("shard.safetensors", (2, 3))),
            ("without rows", shard("shard_2.safetensors", (0, 3))),
            ("no tensors", shard("shard_3.safetensors", ())),
        ):
            self.assertIn(said, self.problem(shards.check, paths))

    def test_only_a_directory_of_nothing_but_shards_is_taken_as_it_is(self):
        shard = self.file("dir/shard_1.safetensors", "")
        self.assertEqual(documents.ready_shards(self.folder / "dir"), [shard])
        self.assertEqual(documents.ready_shards(shard), [])
        self.file("dir/a.txt", "")
        self.assertEqual(documents.ready_shards(self.folder / "dir"), [])


def npy(description, data):
    header = description.encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


class TokenFiles(InFolder):
    def read(self, name, contents, bin_type="uint16"):
        found = token_file.read(self.file(name, contents), bin_type)
        return found.tokens.tolist(), found.row_length

    def test_every_kind_of_file_gives_its_tokens(self):
        four = struct.pack("<4i", 1, 2, 3, 4)
        head = "{'descr': '<i4', 'fortran_order': False, 'shape': "
        self.assertEqual(self.read("a.npy", npy(head + "(4,)}", four)), ([1, 2, 3, 4], None))
        self.assertEqual(self.read("b.npy", npy(head + "(2, 2)}", four)), ([1, 2, 3, 4], 2))
        self.assertEqual(self.read("c.bin", struct.pack("<2H", 7, 65535)), ([7, 65535], None))
        self.assertEqual(self.read("d.bin", struct.pack("<2I", 7, 70000), "uint32"), ([7, 70000], None))
        safetensors_file.write(self.folder / "e.safetensors", {"tokens": Tensor("I64", (1, 2), struct.pack("<2q", 8, 9))})
        found = token_file.read(self.folder / "e.safetensors", "uint16")
        self.assertEqual((found.tokens.tolist(), found.row_length), ([8, 9], 2))

    def test_a_shard_that_the_library_wrote_is_read(self):
        found = token_file.read(MODEL / "architectures/shards/causal/shard_1.safetensors", "uint16")
        self.assertEqual((len(found.tokens), found.row_length), (120, 40))

    def test_what_is_no_file_of_tokens_is_refused(self):
        floats = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 4)
        columns = npy("{'descr': '<i4', 'fortran_order': True, 'shape': (1, 1)}", b"\0" * 4)
        for name, contents, said in (
            ("a.npy", b"hello", "does not begin"), ("b.npy", floats, "<f4"), ("c.npy", columns, "column-major"),
            ("d.bin", b"abc", "3 bytes, is not a whole number"), ("e.bin", b"", "is empty"),
            ("f.safetensors", b"123456789", "not a safetensors file"),
        ):  # fmt: skip
            self.assertIn(said, self.problem(token_file.read, self.file(name, contents), "uint16"))
        safetensors_file.write(self.folder / "g.safetensors", {"x": Tensor("F32", (1,), b"\0" * 4)})
        self.assertIn("no tensor `tokens`", self.problem(token_file.read, self.folder / "g.safetensors", "uint16"))

    def test_a_long_text_is_held_out_in_blocks_and_rows_one_by_one(self):
        long = token_file.read(self.file("a.bin", struct.pack("<5H", *range(5))), "uint16")
        self.assertEqual([block.tolist() for block in long.documents(2)], [[0, 1], [2, 3], [4]])


class SafetensorsFile(InFolder):
    def test_what_is_written_is_read_and_broken_files_are_refused(self):
        tensors = {"a": Tensor("I32", (2, 1), struct.pack("<2i", 1, -2)), "empty": Tensor("F32", (0,), b"")}
        safetensors_file.write(self.folder / "a", tensors)
        found = safetensors_file.read(self.folder / "a")
        self.assertEqual({name: (t.dtype, t.shape, bytes(t.data)) for name, t in found.items()},
                         {name: (t.dtype, t.shape, t.data) for name, t in tensors.items()})
        whole = (self.folder / "a").read_bytes()
        for broken in (b"1234567", whole[:-1], struct.pack("<Q", 1 << 40) + whole[8:], whole[:8] + b"}" + whole[9:]):
            with self.assertRaises(NotSafetensors):
                safetensors_file.read(self.file("b", broken))


class Rows(unittest.TestCase):
    def test_rows_begin_a_stride_apart_and_stay_within_a_document(self):
        found = rows.cut([array("i", range(7)), array("i", range(10, 13))], Cut(3, 2, 99))
        self.assertEqual([list(row) for row in found.rows], [[0, 1, 2], [2, 3, 4], [4, 5, 6], [10, 11, 12]])

    def test_of_too_many_the_same_ones_stay_in_their_order(self):
        document = array("i", range(300))
        some = rows.cut([document], Cut(3, 3, 10))
        self.assertEqual((len(some.rows), some.available), (10, 100))
        self.assertEqual(some.rows, sorted(some.rows))
        more = rows.cut([document], Cut(3, 3, 20))
        self.assertTrue(all(row in more.rows for row in some.rows))

    def test_too_little_text_is_refused(self):
        with self.assertRaises(Problem) as raised:
            rows.cut([array("i", range(7))], Cut(8, 8, 1))
        self.assertIn("the longest has 7", str(raised.exception))

    def test_texts_are_joined_by_the_end_of_sequence(self):
        self.assertEqual(list(rows.packed(["a", "b"], Letters())), [5 + 97, 0, 5 + 98])

    def test_a_token_outside_the_vocabulary_is_refused(self):
        rows.check_vocabulary([[0, 9]], 10)
        rows.check_vocabulary([[99]], None)
        for row in ([10], [-1]):
            with self.assertRaises(Problem):
                rows.check_vocabulary([row], 10)


class Examples(unittest.TestCase):
    def test_masked_tokens_are_the_labels_and_always_the_same(self):
        tokens = array("i", range(100, 164))
        row = masked(tokens, Letters())
        self.assertEqual(row, masked(tokens, Letters()))
        self.assertEqual((row["input_ids"][0], row["input_ids"][-1], len(row["input_ids"])), (1, 2, 66))
        hidden = [place for place, token in enumerate(row["input_ids"]) if token == 3]
        self.assertTrue(1 <= len(hidden) <= 25)
        for place, label in enumerate(row["labels"]):
            self.assertEqual(label, 99 + place if place in hidden else NOT_COUNTED)
        self.assertEqual(masked(array("i", [7]), Letters())["input_ids"].tolist(), [1, 3, 2])

    def test_a_row_is_a_source_and_what_follows_it(self):
        self.assertEqual({name: list(part) for name, part in continued(array("i", [1, 2, 3, 4])).items()},
                         {"input_ids": [1, 2], "labels": [3, 4]})

    def test_pairs_are_padded_and_cut_to_the_window(self):
        row = {name: list(part) for name, part in paired("a", "bcde", Letters(), 3).items()}
        self.assertEqual(row, {"attention_mask": [1, 1, 0], "input_ids": [102, 0, 4], "labels": [103, 104, 0]})


class Shards(InFolder):
    def plan(self, **options):
        plain = dict(task=Task.CAUSAL_LM, window=8, row_tokens=None, stride=None, max_windows=256, split=Split(), vocabulary=300)
        return shards.Plan(**plain | options)

    def make(self, text, **options):
        return shards.make(self.file("text.txt", text), self.plan(**options), Letters(), self.folder)

    def test_a_row_has_a_window_and_its_last_target(self):
        made = self.make("x" * 9 * 70)
        found = shards.read(self.folder)
        self.assertEqual([(number, tensors["tokens"].shape) for number, tensors in found], [(1, (64, 9)), (2, (6, 9))])
        self.assertEqual((made.windows, {tensors["tokens"].dtype for _, tensors in found}), (70, {"I32"}))

    def test_few_windows_are_told_with_how_to_get_more(self):
        long = {"row_tokens": 45}
        for text, options, *said in (
            ("x" * 90, {}, "few windows (10)", "below 32", "from each row: 1", "rows: 10, all that the text has", "give more text"),
            ("x" * 900, {"max_windows": 5}, "few windows (5)", "as many as --max-windows 5 keeps", "raise --max-windows"),
            ("x" * 90, long, "few windows (2)", "; or set --windows-per-row 16."),
            ("x" * 90, long | {"windows_per_row": 8}, "few windows (16)", "from each row: 8, rows: 2,"),
        ):
            with self.subTest(said=said):
                warning = self.make(text, **options).told[-1]
                for part in ("warning: ", *said):
                    self.assertIn(part, warning)
        for text, options in (("x" * 9 * 32, {}), ("x" * 90, long | {"windows_per_row": 16})):
            self.assertEqual(len(self.make(text, **options).told), 2)

    def test_the_same_text_makes_the_same_bytes(self):
        text = "\n\n".join(f"some words {number}" for number in range(200))
        first = self.make(text, split=Split(fraction=0.5), max_windows=10)
        before = (first.folder / "shard_1.safetensors").read_bytes()
        self.make(text, split=Split(fraction=0.5), max_windows=10)
        self.assertEqual((first.folder / "shard_1.safetensors").read_bytes(), before)

    def test_the_other_tasks_have_a_tensor_for_each_input(self):
        self.make("x" * 100, task=Task.MASKED_LM)
        ((_, tensors),) = shards.read(self.folder)
        self.assertEqual({name: t.shape for name, t in tensors.items()}, {"input_ids": (16, 8), "labels": (16, 8)})
        self.make("x" * 100, task=Task.SEQ2SEQ)
        ((_, tensors),) = shards.read(self.folder)
        self.assertEqual({name: t.shape for name, t in tensors.items()}, {"input_ids": (6, 8), "labels": (6, 8)})

    def test_images_and_ones_own_inputs_cannot_be_cut_from_text(self):
        for task in (Task.IMAGE_CLASSIFICATION, Task.OWN):
            self.assertIn("shard_N.safetensors", self.problem(lambda: self.make("x", task=task)))

    def test_text_without_a_tokenizer_is_refused_and_tokens_are_not(self):
        text = self.file("a.txt", "words")
        self.assertIn("set --tokenizer", self.problem(shards.make, text, self.plan(), None, self.folder))
        tokens = self.file("a.bin", struct.pack("<18H", *range(18)))
        self.assertEqual(shards.make(tokens, self.plan(), None, self.folder).windows, 2)

    def test_the_id_is_the_first_number_of_the_name(self):
        self.assertEqual(shards.shard_id(Path("shard_000007-of-9.safetensors")), 7)
        self.assertIn("no number", self.problem(shards.shard_id, Path("last.safetensors")))


class Windows(unittest.TestCase):
    def test_they_are_those_of_the_generator_of_the_tests(self):
        # tests/model/generator/architectures.py cuts the same shard; its losses agree with the worker's.
        self.assertEqual(starts(1, 0, 17, 16), [0])
        self.assertEqual(starts(1, 0, 16, 16), [])
        self.assertEqual([starts(1, row, 40, 16) for row in range(3)], [[23], [4], [3]])
        self.assertEqual(starts(1, 0, 40, 16, 3)[0], 23)
        self.assertEqual(len(set(starts(1, 0, 400, 16, 3))), 3)


class Packages(InFolder):
    def test_fields_are_added_and_the_others_stay(self):
        self.file("model.json", '{"v": 1, "tensors": {"a": {"shape": [2]}, "b": {"shape": [3, 1]}}}')
        package = Package(self.folder)
        self.assertEqual(package.trainable(), {"a": (2,), "b": (3, 1)})
        package.add({"canary": {"loss": 1.5, "tolerance": 0.1}, "trainable": ["b"]})
        self.assertEqual(package.manifest()["canary"], {"loss": 1.5, "tolerance": 0.1})
        self.assertEqual(package.trainable(), {"b": (3, 1)})
        self.assertEqual([path.name for path in self.folder.iterdir()], ["model.json"])

    def test_globs_name_the_adapter_and_nothing_else(self):
        trained = ["l.0.q.lora_A.weight", "l.1.q.lora_A.weight", "head.weight"]
        self.assertEqual(globs(trained, ["l.0.q.weight", "other.head.weight"]), ["*.lora_A.weight", "head.weight"])
        self.assertTrue(matches(["a[0]*"], "a[0].b"))
        self.assertFalse(matches(["a?"], "ab"))

    def test_live_names_become_aliases_of_tensors_that_are_there(self):
        manifest = {"tensors": {"a": {}, "b": {}}, "aliases": {"tied": "a"}}
        live = {"x": "tied", "y": "b", "a": "b", "z": "gone"}
        self.assertEqual(aliases(manifest, live), {"tied": "a", "x": "a", "y": "b"})


class Proofs(unittest.TestCase):
    def test_losses_that_differ_or_are_no_numbers_fail(self):
        Comparison("loss", 2.0, 2.0 + 1e-6, 2e-6).check("")
        for package in (2.0 + 3e-6, float("nan"), float("inf")):
            with self.assertRaises(Problem) as raised:
                Comparison("loss", 2.0, package, 2e-6).check("do this")
            self.assertIn("which is more than 2e-06", str(raised.exception))

    def test_an_update_that_moves_nothing_is_told(self):
        def notes(after):
            return Proof(Comparison("a", 2.0, 2.0, 2e-6), Comparison("b", after, after, 2e-6), 1, 1).notes()

        self.assertEqual(notes(2.1), [])
        self.assertIn("tells little", notes(2.000001)[0])


class Closings(unittest.TestCase):
    def test_the_next_commands_can_be_copied(self):
        check, run, submit = next_commands("scorer", Path("my package"), "cpu", Path("u.safetensors"))
        self.assertEqual(check, "scorer check --set 'model.dir=my package' --set engine.execution_provider=cpu")
        self.assertTrue(run.startswith("scorer run "))
        self.assertIn("--candidate u.safetensors --format safetensors --semantics param_diff --wait", submit)

    def test_sizes_are_readable(self):
        self.assertEqual([readable(size) for size in (999, 1000, 2_460_000_000)], ["999 B", "1.0 kB", "2.5 GB"])


class Stagings(InFolder):
    def test_nothing_is_left_whatever_happens(self):
        for error in (None, ValueError(), KeyboardInterrupt()):
            try:
                with staging.staging(self.folder / "out") as inside:
                    (inside / "file").write_text("x")
                    self.assertEqual(inside.parent, self.folder)
                    if error:
                        raise error
            except (ValueError, KeyboardInterrupt):
                pass
            self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_signal_removes_it_too(self):
        program = (
            "import os, signal, sys, pathlib; from scorer_client.export.staging import staging\n"
            "with staging(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
        )
        done = subprocess.run([sys.executable, "-c", program, str(self.folder / "out")], capture_output=True, text=True)
        self.assertEqual((done.returncode, list(self.folder.iterdir())), (128 + 15, []))

    def test_a_destination_that_cannot_be_made_is_refused(self):
        self.assertIn("exists already", self.problem(staging.check, self.folder))
        self.assertIn("no directory", self.problem(staging.check, self.folder / "no" / "out"))


class Programs(InFolder):
    def program(self, script):
        path = self.file("scorer", f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def test_the_one_that_is_named_is_used_and_must_be_there(self):
        path = self.program("exit 0")
        self.assertEqual(scorer.find(path, "cpu").path, path.resolve())
        self.assertIn("is no program", self.problem(scorer.find, self.folder / "none", "cpu"))

    def test_a_refusal_is_a_problem_with_the_message_above(self):
        refusing = scorer.Scorer(self.program("echo 'scorer: no such tensor' >&2; exit 65"), "cpu")
        with redirect_stderr(StringIO()) as said:
            self.assertIn("its message is above", self.problem(refusing.package, ["--out", "x"]))
        self.assertIn("no such tensor", said.getvalue())

    def test_a_result_that_is_no_score_is_a_problem(self):
        for script, said in (
            ("echo 'scorer: no ONNX Runtime' >&2; exit 69", "scorer validate: no ONNX Runtime"),
            ("echo '{\"status\": \"failed\"}'; exit 1", '"failed"'),
        ):
            self.assertIn(said, self.problem(scorer.Scorer(self.program(script), "cpu").loss, self.folder))
        good = scorer.Scorer(self.program("echo '{\"status\": \"scored\", \"loss\": 2.5}'"), "cpu")
        self.assertEqual(good.loss(self.folder)["loss"], 2.5)


if __name__ == "__main__":
    unittest.main()
