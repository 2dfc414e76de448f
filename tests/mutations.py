"""Break each numeric rule on purpose and see which test notices: `make test-mutations`.

A copy of the package is changed by one text replacement at a time and the tests of that room run on it.  The table
names the first test that failed; a mutation that no test notices, or whose text is not in the code (once), is an error.
Rules are numbered as in the method's list of tests (method.md e); 21 is the loop that puts them together (a.3).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

ROOT = Path(__file__).parents[1]
RELEVANCE, PROTOPNET, EVALUATE = "tests/relevance", "tests/protopnet", "tests/evaluate"
PAIRS = "tests/test_explanation_faithfulness.py"
PROTOTYPES = "tests/test_explanation_prototypes.py"
LOOP = "tests/test_trial_numbers.py"


class Mutation(NamedTuple):
    """One rule broken: its number, in words, where, the text and what stands for it, and the tests that must see it."""

    rule: int
    what: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = [
    Mutation(
        2,
        "logits of the two classes exchanged",
        "protopnet/model.py",
        "return ProtoPNetOutput(self.last_layer(similarities)",
        "return ProtoPNetOutput(self.last_layer(similarities).flip(1)",
        PROTOPNET,
    ),
    Mutation(
        2, "similarity eps 1e-3", "protopnet/model.py", "SIMILARITY_EPS = 1e-4", "SIMILARITY_EPS = 1e-3", PROTOPNET
    ),
    Mutation(
        2, "inner product once, not twice", "protopnet/model.py", "squares - 2 * cross", "squares - cross", PROTOPNET
    ),
    Mutation(
        2, "distance not cut at 0", "protopnet/model.py", "return torch.relu(squares", "return (squares", PROTOPNET
    ),
    Mutation(
        2,
        "score of the mean, not the smallest distance",
        "protopnet/model.py",
        "distances.flatten(2).amin(2)",
        "distances.flatten(2).mean(2)",
        PROTOPNET,
    ),
    Mutation(
        2,
        "one deviation for all channels",
        "protopnet/normalise.py",
        "STD = (0.229, 0.224, 0.225)",
        "STD = (0.229, 0.229, 0.229)",
        PROTOPNET,
    ),
    Mutation(
        3,
        "batch norm's eps forgotten",
        "relevance/canonise.py",
        "running_var.double() + norm.eps",
        "running_var.double()",
        RELEVANCE,
    ),
    Mutation(
        3,
        "negative scale turned positive",
        "relevance/canonise.py",
        "scale = scale * norm.weight.detach().double()",
        "scale = scale * norm.weight.detach().double().abs()",
        RELEVANCE,
    ),
    Mutation(
        3,
        "running mean left out",
        "relevance/canonise.py",
        "(shift - norm.running_mean.double())",
        "(shift)",
        RELEVANCE,
    ),
    Mutation(
        4,
        "power 4 where 2 is due",
        "relevance/rules.py",
        "square if power == 2 else",
        "square.square() if power == 2 else",
        RELEVANCE,
    ),
    Mutation(
        4,
        "cell off by one",
        "relevance/prp.py",
        "distances.argmin(2) if cells is None",
        "(distances.argmin(2) + 1).clamp(max=z.shape[2] - 1) if cells is None",
        RELEVANCE,
    ),
    Mutation(
        4,
        "last cell among ties",
        "relevance/prp.py",
        "distances.argmin(2) if cells is None",
        "(z.shape[2] - 1 - distances.flip(2).argmin(2)) if cells is None",
        RELEVANCE,
    ),
    Mutation(4, "L2 eps 1e-6", "relevance/rules.py", "L2_EPS = 1e-12", "L2_EPS = 1e-6", RELEVANCE),
    Mutation(
        5, "power 4 as power 2", "relevance/rules.py", "square if power == 2 else square.square()", "square", RELEVANCE
    ),
    Mutation(
        6,
        "bias kept in Z of z+",
        "relevance/tape.py",
        "z = F.conv2d(a.to(dtype), weights, None,",
        "z = F.conv2d(a.to(dtype), weights, conv.bias.to(dtype) if zplus else None,",
        RELEVANCE,
    ),
    Mutation(
        6,
        "bias kept in Z of Winograd's z+",
        "relevance/winograd.py",
        "return y.add_(bias.view(1, -1, 1, 1)), z",
        "return y.add_(bias.view(1, -1, 1, 1)), z.add_(bias.view(1, -1, 1, 1))",
        RELEVANCE,
    ),
    Mutation(
        6,
        "small Z left to Winograd's rounding",
        "relevance/winograd.py",
        "if bool(small.any()):",
        "if False:",
        RELEVANCE,
    ),
    Mutation(6, "residual eps 1e-2", "relevance/rules.py", "RESIDUAL_EPS = 1e-6", "RESIDUAL_EPS = 1e-2", RELEVANCE),
    Mutation(
        6,
        "shortcut left out",
        "relevance/tape.py",
        "return inner.add_(rule.shortcut.back(g, record.shortcut, record.sizes[0]))",
        "return inner",
        RELEVANCE,
    ),
    Mutation(
        6,
        "γ- half for sums of either sign",
        "relevance/rules.py",
        "positive = up + down >= 0",
        "positive = up + down >= -1e30",
        RELEVANCE,
    ),
    Mutation(
        6,
        "separating rules in the add-on only",
        "relevance/rules.py",
        "RuleSet((0.02, 0.02))",
        "RuleSet((0.02,))",
        RELEVANCE,
    ),
    Mutation(
        7,
        "seed squared",
        "relevance/prp.py",
        "* seeds[group].unsqueeze(2)",
        "* seeds[group].square().unsqueeze(2)",
        RELEVANCE,
    ),
    Mutation(8, "|w| for w+", "relevance/rules.py", "return weight.clamp(min=0)\n", "return weight.abs()\n", RELEVANCE),
    Mutation(9, "lower box bound 0", "relevance/rules.py", "BOX_LOW = -0.485 / 0.229", "BOX_LOW = -0.0", RELEVANCE),
    Mutation(
        9,
        "upper box bound of the red channel",
        "relevance/rules.py",
        "BOX_HIGH = (1 - 0.406) / 0.225",
        "BOX_HIGH = (1 - 0.485) / 0.229",
        RELEVANCE,
    ),
    Mutation(
        9,
        "box bounds swapped",
        "relevance/rules.py",
        "BOX_LOW * weight.clamp(min=0) + BOX_HIGH * weight.clamp(max=0)",
        "BOX_HIGH * weight.clamp(min=0) + BOX_LOW * weight.clamp(max=0)",
        RELEVANCE,
    ),
    Mutation(
        9,
        "stabiliser's sign",
        "relevance/rules.py",
        "torch.where(t < 0, -eps, eps)",
        "torch.where(t < 0, eps, -eps)",
        RELEVANCE,
    ),
    Mutation(9, "0 / 0 handed on", "relevance/rules.py", ".nan_to_num_(0.0, 0.0, 0.0)", "", RELEVANCE),
    Mutation(
        10,
        "pool windows with one winner overwrite",
        "relevance/rules.py",
        "return cast(Tensor, torch.ops.aten.max_pool2d_with_indices_backward(outer, like, *square, index))",
        "return like.zero_().contiguous().flatten(2).scatter_(2, index.flatten(2), outer.flatten(2)).view(like.shape)",
        RELEVANCE,
    ),
    Mutation(
        10,
        "pool shares among equals of the next cell",
        "relevance/tape.py",
        "z_at_winner = z.flatten(2)",
        "winners = (winners + 1).clamp(max=a.shape[2] * a.shape[3] - 1)\n        z_at_winner = z.flatten(2)",
        RELEVANCE,
    ),
    Mutation(
        11,
        "relevance for sums below 0",
        "relevance/rules.py",
        "positive = t.clamp(min=0)",
        "positive = t.abs()",
        RELEVANCE,
    ),
    Mutation(
        11,
        "residual split by halves",
        "relevance/tape.py",
        "v, over = x, None",
        "y = v = (x + y) / 2\n        over = None",
        RELEVANCE,
    ),
    Mutation(
        12,
        "factors of the first image for all",
        "relevance/tape.py",
        "(per_image(g, n) * factor.unsqueeze(1))",
        "(per_image(g, n) * factor[:1].unsqueeze(1))",
        RELEVANCE,
    ),
    Mutation(
        12,
        "maps combined too freely",
        "relevance/prp.py",
        "(torch.float32, torch.float32, 1e-6)",
        "(torch.float32, torch.float32, 0.3)",
        RELEVANCE,
    ),
    Mutation(
        12,
        "bf16 maps combined too freely",
        "relevance/prp.py",
        "(torch.float32, torch.bfloat16, 5e-3)",
        "(torch.float32, torch.bfloat16, 0.1)",
        RELEVANCE,
    ),
    Mutation(
        13,
        "weights fused in place",
        "relevance/canonise.py",
        "fused = (weight.to(work) * scale",
        "fused = (weight.to(work).mul_(scale.to(work).view(-1, 1, 1, 1)) * scale.sign()",
        RELEVANCE,
    ),
    Mutation(
        13,
        "global generator moved",
        "relevance/prp.py",
        "prototypes = prototypes.to(self.device)\n        self._check",
        "prototypes = prototypes.to(self.device)\n        torch.rand(1)\n        self._check",
        RELEVANCE,
    ),
    Mutation(
        13,
        "requires_grad switched off",
        "relevance/canonise.py",
        'backbone = model.get_submodule("backbone")',
        'backbone = model.get_submodule("backbone").requires_grad_(False)',
        RELEVANCE,
    ),
    Mutation(
        14,
        "patches of any class",
        "protopnet/projection.py",
        "masked_fill(~own[:, :, None]",
        "masked_fill(~own[:, :, None] & False",
        PROTOPNET,
    ),
    Mutation(
        14,
        "last of equal patches",
        "protopnet/projection.py",
        "(flat == nearest[:, None]).long().argmax(1)",
        "flat.shape[1] - 1 - (flat == nearest[:, None]).long().flip(1).argmax(1)",
        PROTOPNET,
    ),
    Mutation(
        14,
        "later image wins a tie of shards",
        "protopnet/projection.py",
        "earlier = (b.images < a.images)",
        "earlier = (b.images > a.images)",
        PROTOPNET,
    ),
    Mutation(
        14,
        "row and column exchanged",
        "protopnet/projection.py",
        "[cell // columns for cell in cells],\n        [cell % columns for cell in cells],",
        "[cell % columns for cell in cells],\n        [cell // columns for cell in cells],",
        PROTOPNET,
    ),
    Mutation(
        14,
        "cell off by one",
        "protopnet/projection.py",
        "vectors = z.flatten(2)[image, :, cell]",
        "vectors = z.flatten(2)[image, :, (cell + 1) % distances.shape[2]]",
        PROTOPNET,
    ),
    Mutation(
        14, "a class without images accepted", "protopnet/projection.py", "    if empty:", "    if False:", PROTOPNET
    ),
    Mutation(
        14,
        "box without the centre's half pixel",
        "protopnet/receptive_field.py",
        "ReceptiveField(image_size, 1, 1, 0.5)",
        "ReceptiveField(image_size, 1, 1, 0.0)",
        PROTOPNET,
    ),
    Mutation(
        15,
        "batch norm moves in the last-layer stage",
        "protopnet/stages.py",
        'settings.last_layer_bn == "published")',
        "True)",
        PROTOPNET,
    ),
    Mutation(
        15,
        "batch norm frozen in published mode",
        "protopnet/stages.py",
        'model.train(stage != "last_layer" or settings.last_layer_bn == "published")',
        'model.train(stage != "last_layer")',
        PROTOPNET,
    ),
    Mutation(
        16,
        "separation's sign",
        "protopnet/settings.py",
        "coefficient_separation: float = -0.08",
        "coefficient_separation: float = 0.08",
        PROTOPNET,
    ),
    Mutation(
        16,
        "cluster over all prototypes",
        "protopnet/losses.py",
        "masked_fill(~own, torch.inf)",
        "masked_fill(own & False, torch.inf)",
        PROTOPNET,
    ),
    Mutation(
        16,
        "L1 over all entries",
        "protopnet/losses.py",
        "(model.last_layer.weight.abs() * other).sum()",
        "model.last_layer.weight.abs().sum()",
        PROTOPNET,
    ),
    Mutation(
        16,
        "weight decay on prototypes",
        "protopnet/stages.py",
        'group("prototypes", [model.prototypes], settings.lr_prototypes, 0)',
        'group("prototypes", [model.prototypes], settings.lr_prototypes, decay)',
        PROTOPNET,
    ),
    Mutation(
        16,
        "last layer trained jointly",
        "protopnet/stages.py",
        '"joint": (model.backbone, model.add_on),',
        '"joint": (model.backbone, model.add_on, model.last_layer),',
        PROTOPNET,
    ),
    Mutation(
        17,
        "schedule stepped after the epoch",
        "protopnet/stages.py",
        "((joint_epoch + 1) //",
        "(joint_epoch //",
        PROTOPNET,
    ),
    Mutation(
        17,
        "projection one epoch late",
        "protopnet/stages.py",
        "beyond = completed - settings.projection_offset",
        "beyond = completed - 1 - settings.projection_offset",
        PROTOPNET,
    ),
    Mutation(
        17,
        "last warm epoch is joint",
        "protopnet/stages.py",
        "epoch < settings.warm_epochs",
        "epoch < settings.warm_epochs - 1",
        PROTOPNET,
    ),
    Mutation(18, "corners aligned", "relevance/heatmaps.py", "align_corners=False", "align_corners=True", RELEVANCE),
    Mutation(
        18,
        "nearest percentile, not linear",
        "relevance/heatmaps.py",
        "ordered[below] + (position - below) * (ordered[above] - ordered[below])",
        "ordered[below]",
        RELEVANCE,
    ),
    Mutation(18, "box one pixel short", "relevance/heatmaps.py", "int(rows[-1]) + 1", "int(rows[-1])", RELEVANCE),
    Mutation(
        18,
        "map scaled by its signed maximum",
        "relevance/heatmaps.py",
        "maps.abs().amax((-2, -1)",
        "maps.amax((-2, -1)",
        RELEVANCE,
    ),
    Mutation(
        19,
        "mask one position short",
        "evaluate/masking.py",
        "int(np.floor(share * size + 1e-9))",
        "int(np.floor(share * size + 1e-9)) - 1",
        EVALUATE,
    ),
    Mutation(
        19,
        "most active half masked",
        "evaluate/masking.py",
        "stack.reshape(len(stack), -1)  # K, H W",
        "-stack.reshape(len(stack), -1)  # K, H W",
        EVALUATE,
    ),
    Mutation(
        19,
        "ties in row order",
        "evaluate/masking.py",
        'np.argsort(order.ravel()[equal], kind="stable")',
        "np.arange(len(equal))",
        EVALUATE,
    ),
    Mutation(
        19,
        "one noise for all images",
        "evaluate/masking.py",
        '"mask noise", image_id, draw',
        '"mask noise", draw',
        EVALUATE,
    ),
    Mutation(
        19,
        "noise not normalised",
        "evaluate/masking.py",
        "(noise.to(image.device, image.dtype) - mean) / std",
        "noise.to(image.device, image.dtype)",
        EVALUATE,
    ),
    Mutation(
        19, "an equal score counts as increase", "evaluate/faithfulness.py", "return s < o", "return s <= o", EVALUATE
    ),
    Mutation(
        19,
        "drop relative to the masked score",
        "evaluate/faithfulness.py",
        "np.maximum(0.0, s - o) / s",
        "np.maximum(0.0, s - o) / o",
        EVALUATE,
    ),
    Mutation(
        19, "negative drops counted", "evaluate/faithfulness.py", "np.maximum(0.0, s - o) / s", "(s - o) / s", EVALUATE
    ),
    Mutation(
        19,
        "multiplicity ignored",
        "evaluate/faithfulness.py",
        "weights=self.weight * values) / np.bincount(row, weights=self.weight)",
        "weights=values) / np.bincount(row)",
        EVALUATE,
    ),
    Mutation(
        19,
        "PRP's maps rank for ProtoPNet",
        "explanation_faithfulness.py",
        '"protopnet": ranked(heat.cpu().numpy()),',
        '"protopnet": ranked(prp),',
        PAIRS,
    ),
    Mutation(
        19, "maps of the other prototypes", "explanation_faithfulness.py", "ranked(prp),", "ranked(prp[::-1]),", PAIRS
    ),
    Mutation(
        19,
        "upsampling always bilinear",
        "explanation_faithfulness.py",
        "size, settings.upsampling)",
        'size, "bilinear")',
        PAIRS,
    ),
    Mutation(
        19,
        "distance for similarity in the heat map",
        "explanation_faithfulness.py",
        "log_similarity(output.distances[0])",
        "-output.distances[0]",
        PAIRS,
    ),
    Mutation(
        19,
        "last of equal logits predicted",
        "explanation_faithfulness.py",
        "int(output.logits[0].argmax())",
        "int(len(output.logits[0]) - 1 - output.logits[0].flip(0).argmax())",
        PAIRS,
    ),
    Mutation(
        20,
        "classes merged by source",
        "relevance/class_maps.py",
        "((label, image_ids[j],",
        "((0, image_ids[j],",
        RELEVANCE,
    ),
    Mutation(
        20,
        "class map not scaled",
        "relevance/class_maps.py",
        "return scale_relevance(displayed.mean(0))",
        "return displayed.mean(0)",
        RELEVANCE,
    ),
    Mutation(
        20, "source first without a tie", "relevance/class_maps.py", "SOURCE_TIE = 5e-5", "SOURCE_TIE = 5.0", RELEVANCE
    ),
    Mutation(
        20,
        "largest distance first",
        "relevance/class_maps.py",
        "np.argsort(table[by_name, j]",
        "np.argsort(-table[by_name, j]",
        RELEVANCE,
    ),
    Mutation(
        20,
        "specificity of one rule set written for both",
        "explanation_prototypes.py",
        "self.explainer if rule == self.settings.rule else make_explainer(self.model, self.settings, rule)",
        "self.explainer",
        PROTOTYPES,
    ),
    Mutation(
        20,
        "specificity of one class",
        "explanation_prototypes.py",
        "parts = [measure_specificity(explainer, films, index, draw) for films, index in groups]",
        "parts = [measure_specificity(explainer, films, index, draw) for films, index in groups[:1]]",
        PROTOTYPES,
    ),
    Mutation(
        20,
        "specificity on other films",
        "explanation_prototypes.py",
        "self.films([self.sources.image_ids[j] for j in members[:2]])",
        "self.films([self.sources.image_ids[0] for j in members[:2]])",
        PROTOTYPES,
    ),
    Mutation(
        20,
        "classes pooled without their n",
        "relevance/specificity.py",
        "return sum(v * n for v, n in values) / sum(n for _, n in values)",
        "return sum(v for v, n in values) / len(values)",
        PROTOTYPES,
    ),
    Mutation(
        20,
        "a prototype that does not fire at its source accepted",
        "explanation_prototypes.py",
        "if self.frozen and gap > self.source_gap:",
        "if False:",
        PROTOTYPES,
    ),
    Mutation(
        20,
        "source gap 1e-3",
        "explanation_prototypes.py",
        "SOURCE_GAP_CHANNELS = 5e-5, 128",
        "SOURCE_GAP_CHANNELS = 1e-3, 128",
        PROTOTYPES,
    ),
    Mutation(
        20,
        "scale of the seed ignored",
        "explanation_prototypes.py",
        '(relevance.scores[0, 0] if self.settings.prp_scale == "score" else 1.0)',
        "1.0",
        PROTOTYPES,
    ),
    Mutation(
        21,
        "labels of other films",
        "trial.py",
        "loss_terms(output, films.labels[index]",
        "loss_terms(output, films.labels[index.flip(0)]",
        LOOP,
    ),
    Mutation(
        21,
        "last layer: labels of other films",
        "trial.py",
        "last_layer_loss(logits, films.labels[index]",
        "last_layer_loss(logits, films.labels[index.flip(0)]",
        LOOP,
    ),
    Mutation(
        21,
        "wrong predictions counted",
        "trial.py",
        "(logits.argmax(dim=1) == self.val_films.labels)",
        "(logits.argmax(dim=1) != self.val_films.labels)",
        LOOP,
    ),
    Mutation(
        21,
        "last layer's step by another optimiser",
        "trial.py",
        'self.optimizers["last_layer"]',
        'self.optimizers["warm"]',
        LOOP,
    ),
    Mutation(
        21,
        "last layer trained on scores from before the projection",
        "trial.py",
        "        record = project_features(self.model, train, self.train_films.labels, self.train_films.ids)\n"
        "        self.at.record = dataclasses.asdict(record)\n"
        '        self.scores = {"val": self.compare(val)}  # N, P\n'
        "        if self.shown_films is self.train_films:\n"
        '            self.scores["shown"] = self.compare(train)\n',
        "        stale = self.compare(train)\n"
        "        record = project_features(self.model, train, self.train_films.labels, self.train_films.ids)\n"
        "        self.at.record = dataclasses.asdict(record)\n"
        '        self.scores = {"val": self.compare(val), "shown": stale}\n',
        LOOP,
    ),
    Mutation(
        21,
        "films never shuffled",
        "trial.py",
        'self.stream("order", stage, *epoch).permutation(len(self.shown_films))',
        "np.arange(len(self.shown_films))",
        LOOP,
    ),
    Mutation(
        21,
        "float32 where bf16 is asked for",
        "trial.py",
        "torch.bfloat16, enabled=bf16)",
        "torch.bfloat16, enabled=False)",
        LOOP,
    ),
    Mutation(
        21,
        "rates of the schedule never set",
        "trial.py",
        "        set_learning_rates(optimizer, self.at.epoch, self.settings)\n",
        "",
        LOOP,
    ),
    Mutation(
        21,
        "rates of the next epoch",
        "trial.py",
        "set_learning_rates(optimizer, self.at.epoch, ",
        "set_learning_rates(optimizer, self.at.epoch + 1, ",
        LOOP,
    ),
    Mutation(
        21,
        "trained in eval-mode batch norm",
        "trial.py",
        "set_stage(self.model, stage, self.settings)",
        "set_stage(self.model, stage, self.settings)\n        self.model.eval()",
        LOOP,
    ),
    Mutation(
        21,
        "moments forgotten after every epoch",
        "trial.py",
        "self.shown_films, self.optimizers[stage],",
        "self.shown_films, build_optimizers(self.model, self.settings)[stage],",
        LOOP,
    ),
]


def first_failure(copy: Path, tests: str) -> str:
    """Run tests on the copy; return the first that failed, or nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    known = os.environ.get("RAYSTUDY_SHARED", str(ROOT.parent / "shared"))
    environment = {**os.environ, "PYTHONPATH": str(copy), "RAYSTUDY_SHARED": known, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    named = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or named is None:
        raise SystemExit(f"pytest did not run ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return named[1].removeprefix("tests/")


def main() -> None:
    """Try the mutations one by one and print who caught them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rule", type=int, action="append", help="only the mutations of this rule; repeatable")
    wanted: list[int] | None = parser.parse_args().rule
    chosen = [m for m in MUTATIONS if not wanted or m.rule in wanted]
    table = Table("rule", "broken on purpose", Column("caught by", overflow="fold"), title=f"{len(chosen)} mutations")
    survived: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "raystudy"
        for name in ("raystudy", "tests", "benchmarks", "experiments"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for tests in dict.fromkeys(m.tests for m in chosen):
            if failed := first_failure(copy, tests):
                raise SystemExit(f"{failed} fails before anything is broken")
        for mutation in chosen:
            path = copy / "raystudy" / mutation.file
            whole = path.read_text()
            if whole.count(mutation.before) != 1:
                raise SystemExit(
                    f"{mutation.file}: {mutation.before!r} is there {whole.count(mutation.before)} times, not once"
                )
            path.write_text(whole.replace(mutation.before, mutation.after))
            caught = first_failure(copy, mutation.tests)
            path.write_text(whole)
            print(f"{mutation.rule}: {mutation.what}: {caught or 'NOT NOTICED'}", file=sys.stderr, flush=True)
            table.add_row(str(mutation.rule), mutation.what, caught or "[bold red]nothing")
            survived += [] if caught else [mutation.what]
    Console().print(table)
    if survived:
        raise SystemExit(f"{len(survived)} not noticed: {'; '.join(survived)}")


if __name__ == "__main__":
    main()
