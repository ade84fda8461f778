"""Explain runs: draw the requested parts, write them, and list the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prompttune.data.files import find_images
from prompttune.data.objects import Data
from prompttune.errors import UsageError
from prompttune.explanation import drawing
from prompttune.explanation.embedding import embed, images_of
from prompttune.explanation.inputs import read_pictures
from prompttune.explanation.page import write_page
from prompttune.explanation.pictures import PictureExplainer
from prompttune.explanation.result import PAGE_FILE, VALUES_FILE, Explanation
from prompttune.explanation.settings import OF_IMAGES, ExplainSettings
from prompttune.explanation.subjects import ExplainedModel, load_subjects
from prompttune.files import locked, write_json
from prompttune.model import PromptModel
from prompttune.training.embedding import extract
from prompttune.training.scoring import resolve_device

Progress = Callable[[str, int, int], None]
"""Function of a description, the number of finished steps and the number of all steps."""


def explain(
    runs: Sequence[PromptModel | str | Path] | PromptModel | str | Path,
    images: Sequence[str | Path] | str | Path = (),
    *,
    output: str | Path,
    data: Data | None = None,
    weights: str | None = None,
    on_step: Progress | None = None,
    **settings: Any,
) -> Explanation:
    """Draw explanations of runs next to their plain backbone: PNG files, one page and a JSON file.

    Args:
        runs: one or several models or checkpoint folders.
        images: image files and folders for attention, Grad-CAM and similarity.
        output: output folder, created if necessary; other files in it stay.
        data: labelled images for t-SNE: a data set as ``train`` takes it, or an image source.
        weights: source of the backbones' weights, if it differs from that of the training.
        on_step: called at every step.
        settings: fields of :class:`ExplainSettings`.

    Raises:
        UsageError: a setting is wrong, another run writes to the output, or a part that was requested by name cannot
            be drawn for these runs.
        CheckpointError, BackboneError: a run cannot be loaded.
        DataError: no image can be read.
    """
    chosen = ExplainSettings(**settings)
    runs = [runs] if isinstance(runs, PromptModel | str | Path) else list(runs)
    images = [images] if isinstance(images, str | Path) else list(images)
    if not images and data is None:
        raise UsageError("nothing to explain: give images, labelled data (--data), or both")
    result = Explanation(Path(output))
    for part in OF_IMAGES if not images else ():
        chosen.leave_out(part, "it needs images; give files or folders of them", result.notes)
    if data is None:
        chosen.leave_out("tsne", "it needs labelled images; give --data", result.notes)
    with locked(result.folder):
        found = list(dict.fromkeys(find_images(images)))
        subjects = load_subjects(runs, resolve_device(chosen.device), weights)
        pictures, corrupt = read_pictures(found, chosen.limit, [one.preprocess for one in subjects])
        result.corrupt += corrupt
        if len(found) > len(pictures) + len(corrupt):
            result.notes.append(f"the first {len(pictures)} of {len(found)} images; --limit takes more")
        tell = on_step or (lambda *_: None)
        # Without images, these parts are left out for all runs, whatever each run supports.
        explainer = PictureExplainer(subjects, chosen, result.notes if images else [])
        result.folder.mkdir(parents=True, exist_ok=True)
        result.values = {"subjects": [_about(one) for one in subjects], "images": []}
        for number, picture in enumerate(pictures):
            tell("images", number, len(pictures))
            explained = explainer.explain(picture)
            name = f"{number:03d}-{_file_part(Path(picture.source).stem)}"
            for part, figure in explained.figures.items():
                result.draw(picture.source, f"{part} of {picture.source}", f"{name}-{part}", figure)
            result.values["images"].append({"image": picture.source, **explained.values})
        if pictures:
            tell("images", len(pictures), len(pictures))
        _summarise(result, explainer)
        _values(result, subjects, chosen)
        if data is not None and chosen.wants("tsne"):
            _embed(result, subjects, data, chosen, tell)
        write_json(result.folder / VALUES_FILE, result.to_dict())
        write_page(result, result.folder / PAGE_FILE)
    return result


def _about(subject: ExplainedModel) -> dict[str, Any]:
    model = subject.model
    return {
        "name": subject.name,
        "method": None if model is None else model.config.method,
        "backbone": subject.backbone.name,
        "image_size": subject.backbone.image_size,
    }


def _summarise(result: Explanation, explainer: PictureExplainer) -> None:
    shares = explainer.prompt_shares()
    if shares:
        title = "part of the attention that lies on prompts, mean over the images"
        result.draw(
            "All images",
            title,
            "attention-on-prompts",
            drawing.values_figure({"share of the attention on prompts": shares}),
        )


def _values(result: Explanation, subjects: Sequence[ExplainedModel], settings: ExplainSettings) -> None:
    """Learned values such as gates and temperatures, for the runs that have them."""
    if not settings.wants("values"):
        return
    found: dict[str, dict[str, dict[int, float]]] = {}
    for subject in subjects:
        for quantity, blocks in ({} if subject.model is None else subject.model.method.values_by_block()).items():
            found.setdefault(quantity, {})[subject.name] = blocks
    if found:
        result.draw("Learned values by block", ", ".join(found), "values", drawing.values_figure(found))
        result.values["values_by_block"] = {
            quantity: {name: [blocks.get(index) for index in range(max(blocks) + 1)] for name, blocks in runs.items()}
            for quantity, runs in found.items()
        }
    else:
        reason = "none of the runs' methods has learned values of one a block, such as GaPT's gates"
        settings.leave_out("values", reason, result.notes)


def _embed(
    result: Explanation,
    subjects: Sequence[ExplainedModel],
    data: Data,
    settings: ExplainSettings,
    tell: Progress,
) -> None:
    chosen = images_of(data, settings)
    sources = chosen.sources
    each, embeddings = sum(map(len, sources)), []

    def told(before: int) -> Callable[[int, int], None]:
        return lambda done, _total: tell("labelled images", before + done, each * len(subjects))

    for number, subject in enumerate(subjects):
        found = extract(
            subject.features, subject.preprocess, sources,
            device=subject.device, batch_size=settings.batch_size, on_batch=told(number * each),
        )  # fmt: skip
        result.corrupt += [line for line in found.corrupt if line not in result.corrupt]
        embeddings.append(embed(subject.name, found.features, found.labels, found.classes, settings.seed))
    title = f"t-SNE of {len(embeddings[0].targets)} images" + (f" of {data}" if isinstance(data, str) else "")
    result.draw("t-SNE", title, "tsne", drawing.embedding_figure(embeddings))
    result.values["tsne"] = {
        "data": data if isinstance(data, str) else None,
        "split": chosen.split,
        "images": len(embeddings[0].targets),
        "seed": settings.seed,
        "nearest_neighbour_accuracy": {one.name: one.nearest_accuracy for one in embeddings},
    }


def _file_part(name: str) -> str:
    """A file name without characters that are special in a shell or a page."""
    return re.sub(r"[^\w.-]+", "_", name)[:60] or "image"
