"""The report: figures, three tables and one self-contained HTML page, from the study directory alone."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raystudy.errors import StudyError
from raystudy.evaluate.intervals import Interval, label_of
from raystudy.evaluate.planted import concentration
from raystudy.evaluate.reliance import Verdict
from raystudy.evaluate.tables import DIFFERENCE
from raystudy.report import figures, panels
from raystudy.report.cohort_table import cohort_table
from raystudy.report.data import FinishedTrial, ReportData, read_report_data
from raystudy.results import DONE
from raystudy.study import Study

SUPERPOSED = {
    "displayed_mean": "scaled to its maximum, averaged",
    "unit_sum": "summed",
    "multiplicity": "scaled to its maximum, summed by how many prototypes are that patch,",
    "score": "scaled to its maximum, summed by score",
    "maximum": "scaled to its maximum, the largest of them",
}
LONGEST_SLUG = 80  # in bytes; a file's name has at most 255
FIGURES_OF_FILMS = "films"  # file names that begin so show films; they leave the study directory only when allowed


@dataclass(frozen=True)
class Written:
    """What `write_report` wrote and what it says."""

    page: str
    sentences: tuple[str, ...]
    files: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Return the answer and where the page is, for a terminal."""
        return "\n".join([*self.sentences, f"report: {self.page}"])


@dataclass
class _Section:
    """One task (and arm) of the page."""

    title: str
    sentence: str
    tiles: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    figures: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    tables: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    note: str = ""
    basis: str = ""
    cohorts: dict[str, Any] | None = None


def write_report(study: Study) -> Written:
    """Write report/index.html, report/figures and report/tables; return what was written.

    Raises
    ------
    StudyError : no trial is finished.
    """
    data = read_report_data(study)
    files: dict[str, bytes] = {}
    for name, table in (
        ("accuracy", data.accuracy),
        ("faithfulness", data.faithfulness),
        ("reliance", data.reliance.drop(columns="interval", errors="ignore")),
        ("accuracy_by_mixture", data.mixtures),
        ("faithfulness_by_mixture", data.faithfulness_mixtures),
        ("specificity", data.specificity),
        ("planted_truth", data.mask_shares),
    ):
        if not table.empty:
            files[f"tables/{name}.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
    slugs = _slugs([keys for keys, _ in data.verdicts])
    sections = [_section(data, *arm, files, slug) for arm, slug in zip(data.verdicts, slugs, strict=True)]
    files["index.html"] = _page(data, sections).encode()
    for name, content in files.items():
        study.storage.write_bytes(f"report/{name}", content)
    for name in set(study.storage.list("report")) - {f"report/{name}" for name in files}:
        study.storage.delete(name)  # of a task, an axis or a table that the plan no longer has
    page = f"{study.storage.uri.rstrip('/')}/report/index.html"
    return Written(page, tuple(s.sentence for s in sections), tuple(f"report/{name}" for name in files))


def _slugs(arms: Sequence[dict[str, object]]) -> list[str]:
    """Return what tells each arm's figures apart in their file names; an axis value may be a path."""
    cohorts = len({arm["cohort_seed"] for arm in arms}) > 1
    found: list[str] = []
    for arm in arms:
        text = "_".join([str(arm["task"]), *(str(v) for k, v in arm.items() if k.startswith("axis."))])
        slug = "".join(c if c.isalnum() or c in "_." else "_" for c in text)
        found.append(f"{slug}_cohort{arm['cohort_seed']}" if cohorts else slug)
    sums = [hashlib.sha256(repr(sorted(arm.items())).encode()).hexdigest()[:8] for arm in arms]
    short = [slug.encode()[:LONGEST_SLUG].decode(errors="ignore") for slug in found]
    plain = [slug == cut and found.count(slug) == 1 for slug, cut in zip(found, short, strict=True)]
    return [cut if one else f"{cut}_{own}" for cut, one, own in zip(short, plain, sums, strict=True)]


def _section(
    data: ReportData, keys: dict[str, object], verdict: Verdict, files: dict[str, bytes], slug: str
) -> _Section:
    arm = tuple(keys.items())
    trials = [t for t in data.trials if t.arm == arm]
    chosen = {k: v for k, v in keys.items() if k != "study"}
    extra = ", ".join(f"{k.removeprefix('axis.')} = {v}" for k, v in keys.items() if k.startswith("axis."))
    cohort = f", cohort seed {keys['cohort_seed']}" if len({t.spec["cohort_seed"] for t in data.trials}) > 1 else ""
    title = f"{str(keys['task']).capitalize()}{f' ({extra})' if extra else ''}{cohort}"
    section = _Section(title, verdict.sentence, _tiles(data, chosen, verdict))
    sources = list(data.experiment["sources"])
    task = str(keys["task"])

    mixtures, reliance = _rows(data.mixtures, chosen), _rows(data.reliance, chosen)
    curves = figures.accuracy_curves(mixtures, _rows(data.accuracy, chosen), task, sources, f"Accuracy, {task}")
    label = label_of(mixtures["seeds"])
    section.basis = _basis(mixtures, reliance)
    section.cohorts = cohort_table(data.study, [t.trial_id for t in trials], sources, trials[0].spec["class_names"])
    _add(
        section,
        files,
        f"accuracy_{slug}",
        curves,
        f"Accuracy of {task} on the three test sets. Bands: 95 % intervals, {label}.",
    )
    curves = figures.reliance_curves(reliance, sources, f"Source reliance and skill, {task}")
    _add(section, files, f"reliance_{slug}", curves, f"Source reliance and skill with 95 % intervals, {label}.")
    faithfulness = _rows(data.faithfulness_mixtures, chosen)
    if not faithfulness.empty:
        bars = figures.faithfulness_bars(faithfulness, f"Faithfulness of the maps, {task}")
        n = int(faithfulness["n_images"].max())
        masked = next(t.faithfulness.read_json(DONE)["settings"]["mask_share"] for t in trials if t.faithfulness)
        caption = f"Average drop and increase with {100 * float(masked):g} % of the film masked, {n} films a trial; the random control ranks pixels by chance. Bars: 95 % intervals, {label_of(faithfulness['seeds'])}."
        _add(section, files, f"faithfulness_{slug}", bars, caption)
    _add_panels(section, files, data, trials, slug)
    section.tables.append(_mixture_rows(mixtures, reliance))
    if not faithfulness.empty:
        section.tables.append(_faithfulness_rows(faithfulness))
    _add_specificity(section, _rows(data.specificity, chosen))
    ids = {t.trial_id for t in trials}
    if not data.mask_shares.empty:
        shares = data.mask_shares[data.mask_shares["trial_id"].isin(ids)]
        if not shares.empty:
            section.tables.append(planted_truth(shares))
    return section


def _basis(mixtures: pd.DataFrame, reliance: pd.DataFrame) -> str:
    """Say what the answer rests on: n of films, mixtures and seeds."""
    sizes = [f"{name}: n = {int(n)}" for name, n in mixtures.groupby("test_set")["n"].max().items()]
    n_mixtures = reliance["h1_share"].nunique()
    return f"{n_mixtures} mixture{'s' * (n_mixtures != 1)}, {_runs(reliance['seeds'])} each; films {', '.join(sizes)}."


def _runs(seeds: pd.Series) -> str:
    """Say how many training runs the mixtures have."""
    least, most = (int(seeds.min()), int(seeds.max())) if len(seeds) else (0, 0)
    return f"{least}{f' to {most}' if most > least else ''} training run{'s' * (most != 1)}"


def _tiles(data: ReportData, chosen: dict[str, object], verdict: Verdict) -> list[dict[str, str]]:
    tiles: list[dict[str, str]] = []
    for end in (verdict.first, verdict.last):
        if end is not None:
            label = f"source reliance at {panels.mixture_name(end.h1_share)}"
            tiles.append(
                {
                    "value": f"{end.source_reliance.estimate:+.2f}".replace("-", "−"),
                    "label": f"{label} ({_range(end.source_reliance)})",
                }
            )
    balanced = _rows(data.mixtures, {**chosen, "h1_share": 50, "test_set": "Test-50-50"})
    if not balanced.empty:
        row = balanced.iloc[0]
        label = f"accuracy on Test-50-50 at 50H1-50H2 ({row['accuracy_low']:.0f}–{row['accuracy_high']:.0f} %, n = {row['n']})"
        tiles.append({"value": f"{row['accuracy']:.1f} %", "label": label})
    if verdict.slope is not None:
        value = verdict.slope
        tiles.append({"value": f"{value.estimate:+.2f}", "label": f"slope of reliance over 0–100 % ({_range(value)})"})
    return tiles


def _range(value: Interval) -> str:
    return f"{value.low:+.2f} to {value.high:+.2f}".replace("-", "−")


def _add(section: _Section, files: dict[str, bytes], name: str, figure: Figure, caption: str) -> None:
    picture = figures.png(figure)
    files[f"figures/{name}.png"] = picture
    files[f"figures/{name}.svg"] = figures.svg(figure)
    encoded = base64.b64encode(picture).decode()
    section.figures.append({"data": encoded, "alt": caption, "caption": caption})


def _add_panels(
    section: _Section, files: dict[str, bytes], data: ReportData, trials: list[FinishedTrial], slug: str
) -> None:
    """Add the panels like Fig. 5, 4 and 6 of the first seed that has explained trials."""
    shown = [t for t in trials if t.prototypes is not None]
    if not shown:
        return
    first = min(int(t.spec["seed"]) for t in shown)
    ordered = sorted((t for t in shown if t.spec["seed"] == first), key=lambda t: int(t.spec["h1_share"]))
    explained = [e for t in ordered if (e := panels.read_explained(t)) is not None]
    names = list(explained[0].trial.spec["class_names"])
    grid = panels.class_map_grid(explained, names, "Global class maps")
    caption = f"Class maps: each unique prototype's PRP map on its own source film, {SUPERPOSED[explained[0].superposition]} over the class; seed {first}."
    _add(section, files, f"{FIGURES_OF_FILMS}_class_maps_{slug}", grid, caption)
    spread = [explained[i] for i in sorted({0, len(explained) // 2, len(explained) - 1})]
    strong = min(explained, key=lambda e: abs(int(e.trial.spec["h1_share"]) - 90))
    rows = {id(e): _strongest(e) for e in [*spread, strong]}
    wanted = list(dict.fromkeys(i for e in [*spread, strong] for i in e.image_ids))
    try:
        films = data.study.films(wanted, int(strong.trial.spec["image_size"]), strong.trial.spec["axes"])
    except (StudyError, FileNotFoundError):
        section.note = (
            "The films are not beside this study any more, so no panel shows any: `raystudy prepare EXPERIMENT`."
        )
        return
    for label in (0, 1):
        panel = panels.top_images_panel(strong, films, rows[id(strong)][label], names[label])
        caption = f"The training films that the commonest prototype of “{names[label]}” fires at most, and its PRP maps there; seed {first}."
        _add(section, files, f"{FIGURES_OF_FILMS}_top_images_{label}_{slug}", panel, caption)
    chosen = [(e, row) for e in spread for row in rows[id(e)]]
    panel = panels.prototype_panel(chosen, films, names, "Prototypes on their source films")
    caption = f"A prototype of each class at three mixtures: its source film, the ProtoPNet heat map and the PRP map; seed {first}."
    _add(section, files, f"{FIGURES_OF_FILMS}_prototypes_{slug}", panel, caption)


def _strongest(explained: panels.Explained) -> list[int]:
    """Return the row of the commonest unique prototype of each class, of one with relevance where there is any."""
    table = explained.unique
    rank = table["multiplicity"].to_numpy() + 1e6 * explained.maps.any(axis=(1, 2))
    return [int(np.where(table["class"] == label, rank, -1).argmax()) for label in (0, 1)]


def _mixture_rows(mixtures: pd.DataFrame, reliance: pd.DataFrame) -> dict[str, Any]:
    rows = []
    for share, group in mixtures.groupby("h1_share"):
        cells = [panels.mixture_name(int(str(share)))]
        for test_set in figures.TEST_SETS:
            one = group[group["test_set"] == test_set]
            cells.append(_with_range(one.iloc[0], "accuracy", ".1f") if len(one) else "–")
        one = reliance[reliance["h1_share"] == share]
        cells += [_with_range(one.iloc[0], name, "+.2f") if len(one) else "–" for name in ("source_reliance", "skill")]
        rows.append([*cells, str(group["seeds"].max())])
    columns = ["mixture", *figures.TEST_SETS, "source reliance", "skill", "seeds"]
    return {"title": "Numbers", "columns": columns, "rows": rows, "note": "Accuracy in %; in brackets 95 % intervals."}


def _faithfulness_rows(table: pd.DataFrame) -> dict[str, Any]:
    rows = []
    for (share, test_set), group in table.groupby(["h1_share", "test_set"]):
        start = [panels.mixture_name(int(str(share))), str(test_set)]
        words = {method: (word, ".1f") for method, (word, _) in figures.METHODS.items()}
        for method, (word, form) in (words | {DIFFERENCE: ("PRP − ProtoPNet", "+.1f")}).items():
            for _, row in group[group["method"] == method].iterrows():
                cells = [_with_range(row, name, form) for name in ("average_drop", "average_increase")]
                rows.append([*start, word, *cells, f"{row['n_images']} / {row['n_pairs']}"])
                start = ["", ""]
    runs = f"Means over {_runs(table['seeds'])} a mixture"
    return {
        "title": "Average drop (AD) and increase (AI), %",
        "columns": ["mixture", "test set", "map", "AD", "AI", "films / pairs"],
        "rows": rows,
        "note": f"{runs}; in brackets 95 % intervals, {label_of(table['seeds'])}. Lower drop and higher increase are better. The difference is in points, paired by film and training run. Every trial: tables/faithfulness.csv.",
    }


def _add_specificity(section: _Section, table: pd.DataFrame) -> None:
    if table.empty:
        return
    numbers = [c for c in table.columns if table[c].dtype.kind == "f" and not c.startswith("n_")]
    rows = [
        [rule, *(_with_extremes(group, c) for c in numbers), str(len(group))] for rule, group in table.groupby("rule")
    ]
    section.tables.append(
        {
            "title": "Do the maps depend on which prototype they explain?",
            "columns": ["rule", *(c.replace("_", " ") for c in numbers), "trials"],
            "rows": rows,
            "note": "Means over trials; in brackets the lowest and the highest trial; n: pairs of maps in all trials. Conservation: the share of a prototype's relevance that arrives at the film. Correlations (of maps that share a cell, and with shuffled channel weights) near 1 say that a map shows where a prototype fires, hardly which prototype it is.",
        }
    )


def _with_extremes(table: pd.DataFrame, name: str) -> str:
    values = table[name]
    if not values.notna().any():
        return "–"
    n = f", n = {int(table[f'n_{name}'].sum())}" if f"n_{name}" in table.columns else ""
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f}){n}".replace("-", "−")


def planted_truth(table: pd.DataFrame) -> dict[str, Any]:
    """Return the page's table of relevance inside the planted masks; rows of `planted_truth.csv` of one arm."""
    kinds = sorted(table["mask"].unique())
    rows = []
    for share, group in table.groupby("h1_share"):
        cells = [panels.mixture_name(int(str(share)))]
        for kind in kinds:
            one = group[(group["mask"] == kind) & (group["area_share"] > 0)]
            felt = one[one["positive_share"].notna()]
            if not len(felt):
                cells += ["–", "–", "–", f"{len(one)} / {one['image_id'].nunique()}"]
                continue
            found = concentration(*(felt[c] for c in ("positive_share", "area_share", "multiplicity", "image_id")))
            limits = "" if found.low is None else f" ({found.low:.1f} to {found.high:.1f})"
            cells += [f"{100 * found.relevance:.1f} %", f"{100 * found.area:.1f} %", f"{found.ratio:.1f} ×{limits}"]
            cells.append(f"{len(felt)} / {found.n_films}")
        silent = group[group["positive_share"].isna()]
        rows.append([*cells, str(len(silent[["trial_id", "prototype"]].drop_duplicates()))])
    columns = ["mixture"]
    for kind in kinds:
        columns += [f"relevance in {kind}", f"area of {kind}", "ratio", "prototypes / films"]
    return {
        "title": "Planted truth: where the prototypes' relevance lies",
        "columns": [*columns, "without relevance"],
        "rows": rows,
        "note": "Share of positive PRP relevance inside the planted masks, over the different prototypes whose film carries one. A ratio of 1 is what relevance without any aim would reach; in brackets its 95 % interval over films (approximate, conditional on these training runs) where there are enough films. Prototypes without relevance have a cell where the layers above the backbone are silent: nothing comes down to the film, and their maps are zero.",
    }


def _with_range(row: Any, name: str, form: str) -> str:
    text = f"{row[name]:{form}} ({row[f'{name}_low']:{form}} to {row[f'{name}_high']:{form}})"
    return text.replace("-", "−")


def _rows(table: pd.DataFrame, wanted: dict[str, object]) -> pd.DataFrame:
    keep = pd.Series(data=True, index=table.index)
    for key, value in wanted.items():
        if key in table.columns:
            keep &= table[key] == value
    return table[keep]


def _page(data: ReportData, sections: list[_Section]) -> str:
    counts = data.status.counts
    training, model = data.experiment["training"], data.experiment["model"]
    notes = [str(n) for n in data.experiment["notes"]]
    if model["weights"] == "none":
        notes.append(
            "The backbones start from random weights; absolute accuracies cannot be compared with the paper's."
        )
    if training["last_layer_bn"] == "frozen":
        notes.append(
            "In the last-layer stage batch norm is frozen, so that every prototype stays a patch of a training film; the published code lets it drift."
        )
    single = data.mixtures["seeds"] == 1
    if single.any():
        which = "Each mixture has" if single.all() else "Some mixtures have"
        notes.append(f"{which} one training run: their intervals are conditional on it; add seeds to cover training.")
    lacking = [t.trial_id for t in data.trials if not t.explained]
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        notes.append(
            f"{len(lacking)} of {len(data.trials)} finished trials are not explained as the experiment asks, and stand in no map and no average drop: {shown}. `raystudy run EXPERIMENT` goes on with them."
        )
    notes.append("The best state is chosen on a validation set that is mixed like the training set, as in the paper.")
    states = ", ".join(f"{n} {state}" for state, n in counts.items() if n and state != "finished")
    unfinished = [(t.trial_id, t.state, t.message) for t in data.status.trials if t.state != "finished"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raystudy.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        study=data.study.name,
        n_finished=counts["finished"],
        n_trials=len(data.status.trials),
        states=states,
        sections=sections,
        sources=list(data.experiment["sources"]),
        notes=notes,
        unfinished=unfinished,
    )
