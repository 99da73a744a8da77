"""MkDocs hooks: the navigation, and pages and tables that are generated from the code.

Generated pages: reference/recipe.md, reference/cli.md, reference/api.md, contributing.md and changelog.md. A line
`<!-- made: NAME -->` on a page is replaced by the table of that name.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parents[1]
# Section of each page; pages that are not listed here are put under "More".
ORDER: dict[str, list[str]] = {
    "Start here": [
        "index.md",
        "own-objectives.md",
        "which-tool.md",
        "data.md",
        "datasets.md",
        "how-many-ratings.md",
        "labels.md",
    ],
    "Train": ["concepts.md", "backbones.md", "heads.md", "fine-tuning.md", "extraction.md", "scale.md", "findings.md"],
    "Use": [
        "explaining.md",
        "training-rows.md",
        "attribution.md",
        "evaluation.md",
        "everyday.md",
        "verbosity.md",
        "monitoring.md",
        "playground.md",
        "released-checkpoint.md",
    ],
    "Serve and integrate": [
        "serving.md",
        "dense-rewards.md",
        "integrations.md",
        "vllm.md",
        "hugging-face.md",
        "without-armorm.md",
    ],
    "Reference": ["reference/recipe.md", "reference/cli.md", "reference/api.md", "reliability.md"],
    "Project": ["architecture.md", "contributing.md", "release.md", "changelog.md", "migration.md", "licences.md"],
}


def made_pages() -> dict[str, str]:
    """Generated pages; files at the root of the repository link to `docs/`, the site is that folder."""
    changelog, contributing = (
        (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for name in ("CHANGELOG.md", "CONTRIBUTING.md")
    )
    return {
        "reference/recipe.md": recipe_reference(),
        "reference/cli.md": cli_reference(),
        "reference/api.md": api_reference(),
        "changelog.md": changelog,
        "contributing.md": contributing,
    }


def on_config(config: Any) -> Any:
    """Build the navigation."""
    docs = Path(config["docs_dir"])
    existing = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} | set(made_pages())
    nav: list[dict[str, list[str]]] = [
        {title: [page for page in pages if page in existing]} for title, pages in ORDER.items()
    ]
    placed = {page for pages in ORDER.values() for page in pages}
    rest = sorted(existing - placed)
    config["nav"] = [part for part in nav if any(part.values())] + ([{"More": rest}] if rest else [])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in generated tables, and turn links to files outside docs/ into code."""
    return plain_outside_links(filled(markdown), page.file.src_uri)


def filled(markdown: str) -> str:
    """The text with its generated tables."""
    tables = {"datasets": dataset_tables, "scale": scale_table, "layouts": layout_table, "probe": probe_table}
    tables |= {"learning": learning_table, "judge": judge_table, "suggest": suggest_table}
    return re.sub(r"<!-- made: (\w+) -->", lambda found: tables[found[1]](), markdown)


def plain_outside_links(markdown: str, page: str) -> str:
    """Links to files outside docs/ (recipes, source, tests) as code, since the site does not contain them."""

    def replaced(found: re.Match[str]) -> str:
        target = found[2].split("#")[0]
        if "://" in target or not target:
            return found[0]
        place = (ROOT / "docs" / page).parent / target
        outside = ROOT / "docs" not in (place.resolve(), *place.resolve().parents)
        return f"{found[1]} (`{place.resolve().relative_to(ROOT).as_posix()}`)" if outside else found[0]

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", replaced, markdown)


# --- references ----------------------------------------------------------------------------------


def recipe_reference() -> str:
    """Every key of a recipe, from the pydantic models that validate it."""
    from armorm.training import schema as module
    from armorm.training.recipe import Recipe

    lines = [
        "# Recipe reference",
        "",
        "Generated from the models that validate a recipe. Unknown keys are rejected.",
        "",
    ]
    sections: list[tuple[str, type]] = [("The recipe", Recipe)]
    sections += [
        (name, entry)
        for name, entry in vars(module).items()
        if inspect.isclass(entry) and issubclass(entry, module.Section) and entry is not module.Section
    ]
    for name, section in sections:
        lines += [f"## {name.removesuffix('Section') if name.endswith('Section') else name}", ""]
        lines += [
            f"{(inspect.getdoc(section) or '').split(chr(10) * 2)[0]}",
            "",
            "| key | type | default | |",
            "|---|---|---|---|",
        ]
        for key, field in section.model_fields.items():  # type: ignore[attr-defined]
            default = "required" if field.is_required() else _default(field)
            lines.append(
                f"| `{field.alias or key}` | {_kind(field.annotation)}{_bounds(field.metadata)} | {default} | {field.description or ''} |"
            )
        lines.append("")
    return "\n".join(lines)


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if hasattr(type(value), "model_fields"):
        return "see below"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _kind(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return ""
    if hasattr(annotation, "model_fields"):
        return (
            f"[{annotation.__name__.removesuffix('Section')}](#{annotation.__name__.removesuffix('Section').lower()})"
        )
    arguments = get_args(annotation)
    if not arguments:
        return f"`{getattr(annotation, '__name__', annotation)}`"
    if "Literal" in str(get_origin(annotation)):
        return ", ".join(f"`{value}`" for value in arguments)
    if get_origin(annotation) in (tuple, list):
        return "list of " + _kind(arguments[0])
    if get_origin(annotation) is dict:
        return f"{_kind(arguments[0])} to {_kind(arguments[1])}"
    parts = [_kind(argument) for argument in arguments if argument is not type(None) and not _is_bound(argument)]
    return " or ".join(part for part in parts if part)


def _is_bound(argument: Any) -> bool:
    return not isinstance(argument, type) and type(argument).__module__.startswith(("annotated_types", "pydantic"))


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return "".join(
        f", {sign} {getattr(part, name)}" for part in metadata for name, sign in signs.items() if hasattr(part, name)
    )


def cli_reference() -> str:
    """Every command with its arguments and options, from the application."""
    import typer

    from armorm.cli.app import app

    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line reference",
        "",
        "Generated from the command line application. `--help` of each command prints the same.",
        "",
    ]
    for name, command in group.commands.items():
        lines += [f"## armorm {name}", "", inspect.cleandoc(command.help or ""), ""]
        lines += ["| argument or option | default | |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            label = ", ".join(f"`{option}`" for option in parameter.opts)
            if parameter.param_type_name == "argument":
                label = f"`{parameter.name.upper()}`"
            default = parameter.default
            shown = "" if default is None or callable(default) or default == () else f"`{default}`"
            text = (getattr(parameter, "help", "") or "").replace("|", "\\|")
            lines.append(f"| {label} | {'required' if parameter.required else shown} | {text} |")
        lines.append("")
    return "\n".join(lines)


def api_reference() -> str:
    """The public names of the package with their docstrings, and the purpose of each module."""
    import armorm

    lines = ["# Python API", "", "Generated from the source. The package exports:", ""]
    for name in sorted(armorm._HOMES):
        thing = getattr(armorm, name)
        lines += [f"## {name}", "", f"`{armorm._HOMES[name]}.{name}`", "", *_documented(thing), ""]
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                target = getattr(function, "__func__", function)
                if not method.startswith("_") and inspect.isfunction(target) and target.__doc__:
                    lines += [f"### {name}.{method}", "", *_documented(target), ""]
    lines += ["## Modules", "", "| module | |", "|---|---|"]
    for path, first in _modules():
        lines.append(f"| `{path}` | {first} |")
    return "\n".join(lines)


def _documented(thing: Any) -> list[str]:
    try:
        signature = f"{thing.__name__}{inspect.signature(thing)}"
    except (TypeError, ValueError):
        signature = getattr(thing, "__name__", "")
    return ["```text", signature, "", inspect.getdoc(thing) or "", "```"]


def _modules() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "src" / "armorm").rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            name = path.relative_to(ROOT / "src").with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            yield name, text.splitlines()[0].replace("|", "\\|")


# --- tables --------------------------------------------------------------------------------------


def dataset_tables() -> str:
    """Every preset: hub id, revision, objectives, licence, size."""
    from armorm.data.presets import PREFERENCE_PRESETS, RATING_PRESETS

    lines = [
        "### Rated sets",
        "",
        "| preset | hub id | revision | objectives (raw scale) | licence | rows |",
        "|---|---|---|---|---|---|",
    ]
    for name, preset in RATING_PRESETS.items():
        made = preset.objectives(name).values()
        spans: dict[tuple[float, float], list[str]] = {}
        for objective in made:
            spans.setdefault((objective.low, objective.high), []).append(objective.name)
        columns = "; ".join(f"{', '.join(names)} ({low:g}-{high:g})" for (low, high), names in spans.items())
        lines.append(
            f"| `{name}` | {preset.hub_id} | {_revision(preset)} | {columns} | {preset.licence} | {_size(preset)} |"
        )
    lines += [
        "",
        "### Preference pairs",
        "",
        "| preset | hub id | revision | split | licence | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for name, paired in PREFERENCE_PRESETS.items():
        lines.append(
            f"| `{name}` | {paired.hub_id} | {_revision(paired)} | {paired.split} | {paired.licence} | {_size(paired)} |"
        )
    return "\n".join(lines)


def _revision(preset: Any) -> str:
    return f"`{preset.revision[:12]}`" if preset.revision else "main, unconfirmed"


def _size(preset: Any) -> str:
    if preset.rows is None:
        return "unknown"
    about = "about " if preset.rounded else ""
    each = f" of {preset.each} responses" if preset.each > 1 else ""
    return f"{about}{preset.rows:,}{each}"


def layout_table() -> str:
    """The columns that each layout function reads, from its docstring."""
    from armorm.data import layouts

    lines = ["| layout | columns as published |", "|---|---|"]
    for name, function in vars(layouts).items():
        if inspect.isfunction(function) and not name.startswith("_") and function.__module__ == layouts.__name__:
            lines.append(f"| `{name}` | {(inspect.getdoc(function) or '').splitlines()[0]} |")
    return "\n".join(lines)


def probe_table() -> str:
    """Layers and poolings of `armorm-small`, from benchmarks/results/probe-small.json (`armorm probe --json`)."""
    import json

    found = json.loads((ROOT / "benchmarks/results/probe-small.json").read_text(encoding="utf-8"))
    best, counts = found["best"], found["counts"]
    lines = [
        f"{counts['train_rows']:,} rated rows and {counts['train_pairs']:,} pairs to fit heads on; {counts['test_rows']:,} "
        f"rows and {counts['test_pairs']:,} pairs of other training prompts to measure them on; "
        f"{counts['objectives']} objectives. The best of each column is bold.",
        "",
        "| layer | pooling | Spearman | within prompts | pairs | cost |",
        "| --: | --- | --: | --: | --: | --: |",
    ]
    for entry in found["readouts"]:
        readout = {"layer": entry["layer"], "pooling": entry["pooling"]}
        cells = []
        for figure in ("spearman", "within_prompt", "pairs"):
            text = "" if entry[figure] is None else f"{entry[figure]:.3f}"
            cells.append(f"**{text}**" if best[figure] == readout else text)
        lines.append(f"| {entry['layer']} | {entry['pooling']} | {' | '.join(cells)} | {entry['cost']:.0%} |")
    return "\n".join(lines)


def learning_table() -> str:
    """Spearman by the number of ratings, from benchmarks/results/learning_curve.json."""
    import json

    found = json.loads((ROOT / "benchmarks/results/learning_curve.json").read_text(encoding="utf-8"))
    sizes = (50, 100, 200, 400, 1600, 6400)  # the picture and the file have the others
    lines = [
        f"| objective (ratings, prompts) | sample | {' | '.join(f'{size:,}' for size in sizes)} | all |",
        f"| --- | --- |{' --: |' * (len(sizes) + 1)}",
    ]
    for entry in sorted(found["objectives"], key=lambda entry: -entry["ratings"]):
        for sample in (name for name in ("whole", "spread") if name in entry):
            *curve, last = entry[sample]["spearman"]
            by_size = dict(zip(entry["sizes"], curve))  # noqa: B905, without the last size
            cells = ["" if by_size.get(size) is None else f"{by_size[size]:.2f}" for size in sizes]
            start = f"{entry['objective']} ({entry['ratings']:,}, {entry['prompts']:,}) | {sample}"
            lines.append(f"| {start} | {' | '.join(cells)} | {last:.2f} |")
    return "\n".join(lines)


def judge_table() -> str:
    """What a small judge's labels are worth, from benchmarks/results/judge_labels.json."""
    import json

    found = json.loads((ROOT / "benchmarks/results/judge_labels.json").read_text(encoding="utf-8"))
    lines = [
        "| objective | replies | valid answers, text | valid answers, schema | Spearman | kappa | bias | length |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, entry in found["objectives"].items():
        cells = [f"{entry['valid'][kind]:.0%}" for kind in ("text", "schema")]
        for figure in ("Spearman", "kappa", "bias", "length"):
            value, interval = entry["agreement"][figure]["value"], entry["agreement"][figure]["interval"]
            ends = "" if interval is None else " ({:.2f} to {:.2f})".format(*interval)
            cells.append("" if value is None else f"{value:.2f}{ends}")
        lines.append(f"| {name} | {entry['replies']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def suggest_table() -> str:
    """Spearman by how the next ratings are chosen, from benchmarks/results/suggest.json."""
    import json

    found = json.loads((ROOT / "benchmarks/results/suggest.json").read_text(encoding="utf-8"))
    sizes = sorted({size for entry in found["objectives"].values() for size in entry["sizes"]})[1:]
    lines = [
        f"| objective (ratings, prompts) | choice | {' | '.join(f'{size:,}' for size in sizes)} |",
        f"| --- | --- |{' --: |' * len(sizes)}",
    ]
    for name, entry in found["objectives"].items():
        for choice, curve in entry["spearman"].items():
            by_size = dict(zip(entry["sizes"], curve, strict=True))
            errors = dict(zip(entry["sizes"], entry["gain"].get(choice, {}).get("standard_error", []), strict=False))
            cells = [
                "" if size not in by_size else f"{by_size[size]:.3f}" + (f" ± {errors[size]:.3f}" if errors else "")
                for size in sizes
            ]
            start = f"{name} ({entry['ratings']:,}, {entry['prompts']:,})" if choice == "random" else ""
            lines.append(f"| {start} | {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scale_table() -> str:
    """Cost from a thousand to a billion conversations on an 8B backbone: tokens, FLOPs, hours, bytes."""
    from armorm.training.cost import (
        DEVICES,
        KNOWN_SHAPES,
        Hardware,
        Workload,
        readable_bytes,
        readable_hours,
        stages,
    )

    shape, h100 = KNOWN_SHAPES["sfairXC/FsfairX-LLaMA3-RM-v0.1"], DEVICES["h100"]
    lines = [
        "| conversations | tokens | forward FLOPs | 1 H100 | 8 H100 | 32 H100 | GPU hours | features on disk | stage 1 memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for exponent in range(3, 10):
        count = 10.0**exponent
        work = Workload(count, count, count * 450, count * 450**2 * 1.6, count / 2, 11, 19, count / 4)
        parts = [stages(shape, work, Hardware("", h100.peak, h100.memory, n)) for n in (1, 8, 32)]
        flops = shape.forward_flops(work.tokens, work.squares)
        cells = [f"{count:,.0f}", f"{work.tokens:.2g}", f"{flops:.2g}", *(readable_hours(p[0].hours) for p in parts)]
        cells += [f"{parts[0][0].hours:,.2g}" if parts[0][0].hours < 10 else f"{parts[0][0].hours:,.0f}"]
        cells += [readable_bytes(parts[0][0].disk), readable_bytes(parts[0][1].memory)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(scale_table())
