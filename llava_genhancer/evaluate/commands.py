"""The verbs that measure. Each imports what it needs when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava_genhancer.arguments import Verbs, path


def add_verbs(verbs: Verbs) -> None:
    """From ``mmvp-vlm`` to ``report``."""
    sub = verbs.add("mmvp-vlm", _mmvp_vlm, "Measure towers on MMVP-VLM; the first is the one others are compared with.")
    sub.add_argument(
        "towers", type=path, nargs="+", metavar="TOWER", help="folder or hub id of a CLIPModel or SiglipModel"
    )
    sub.add_argument(
        "--data", type=path, required=True, metavar="DIR", help="folder with Questions.csv and 'MLLM_VLM Images'"
    )
    sub.add_argument("--output", type=path, metavar="JSON", help="write the results here, and the picture beside it")
    sub.add_argument("--batch_size", type=int, default=64)
    sub.add_argument("--locals", action="store_true", help="score the mean of the local tokens too, as DIVA does")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    sub = verbs.add(
        "zero-shot",
        _zero_shot,
        "Measure towers' zero-shot classification and retrieval (Table 3); what was measured is not measured again.",
        epilog="A data set is a folder called like clip_benchmark's (imagenet1k, cifar100, sun397, cars, flickr30k, "
        "mscoco_captions): its webdataset export, parquet, Karpathy's dataset_*.json or captions.jsonl beside the "
        "images, or a folder of images per class.",
    )
    sub.add_argument(
        "towers", type=path, nargs="+", metavar="TOWER", help="folder or hub id; others are compared with the first"
    )
    _add_zero_shot_options(sub)
    sub.add_argument(
        "--output", type=path, metavar="JSON", help="write the results here, and each set's answers beside it"
    )

    sub = verbs.add(
        "curve",
        _curve,
        "MMVP-VLM against zero-shot retention at strengths between the original tower and the enhanced one, to choose "
        "one for `export --lora_scale`.",
    )
    sub.add_argument("towers", type=path, nargs="+", metavar="RUN", help="a run; or two towers, ORIGINAL and ENHANCED")
    _add_zero_shot_options(sub)
    sub.add_argument("--mmvp", type=path, required=True, metavar="DIR", help="MMVP-VLM's folder")
    sub.add_argument("--lora_scale", metavar="S,...", default="0,0.25,0.5,0.75,1", help="strengths from 0 to 1")
    sub.add_argument(
        "--output", type=path, metavar="JSON", help="default: RUN/eval/curve.json; the picture goes beside it"
    )

    sub = verbs.add("generation", _generation, "Score a run's rebuilt images, and MMVP-VLM on its snapshots (Fig. 1).")
    sub.add_argument("run_dir", type=path, metavar="RUN")
    sub.add_argument("--data", type=path, metavar="DIR", help="MMVP-VLM's folder (default: no MMVP-VLM)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    sub = verbs.add("probes", _probes, "Probe one or two towers of the toy world for each detail of its scenes.")
    sub.add_argument("towers", type=path, nargs="+", metavar="TOWER", help="the original, then the enhanced one")
    sub.add_argument("--output", type=path, required=True, metavar="JSON")

    sub = verbs.add(
        "questions", _questions, "Ask LLaVAs questions with known options; the first is what others are compared with."
    )
    sub.add_argument(
        "checkpoints", type=path, nargs="+", metavar="CHECKPOINT", help="folder in HF's form or the original one"
    )
    sub.add_argument("--data", type=path, required=True, metavar="DIR", help="folder with questions.json and images/")
    sub.add_argument("--output", type=path, required=True, metavar="JSON")
    sub.add_argument("--labels", nargs="+", help="a name for each (default: as much of each path as tells them apart)")
    sub.add_argument("--conversation", default="v1", help="template that they were trained with (default: v1)")
    sub.add_argument("--batch_size", type=int, default=64)
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")

    sub = verbs.add("mllm", _mllm, "Evaluate LLaVAs on the paper's Table 2 with lmms-eval; the same command goes on.")
    sub.add_argument(
        "checkpoints", type=path, nargs="+", metavar="CHECKPOINT", help="a finetuning's folder, or a checkpoint"
    )
    sub.add_argument(
        "--output_dir", type=path, required=True, metavar="DIR", help="a run's eval/lmms, where the report looks"
    )
    sub.add_argument("--labels", nargs="+", help="a name for each; the report compares with the one called original")
    sub.add_argument("--tasks", default="genhancer", help="lmms-eval's, comma-separated (default: all of Table 2)")
    sub.add_argument(
        "--data", type=path, metavar="DIR", help="local copies of the data sets: DIR/<organisation>/<name>"
    )
    sub.add_argument(
        "--batch_size", type=int, default=1, help="questions at a time; fewer where memory ends (default: 1)"
    )
    sub.add_argument("--processes", type=int, help="GPUs to spread the questions over (default: all that are here)")
    sub.add_argument("--limit", type=int, help="only the first so many questions of each task")
    sub.add_argument("--model_args", default="", help="more for our lmms-eval model, for example answer=generate")

    sub = verbs.add("report", _report, "Write report.md, report.html, report.json, tables/ and figures/ for a run.")
    sub.add_argument(
        "run_dirs", type=path, nargs="+", metavar="RUN", help="the run, then others whose rows stand beside its own"
    )
    sub.add_argument(
        "--baseline", type=path, metavar="RUN", help="compare with this run's model (default: the run's original)"
    )


def _add_zero_shot_options(parser: argparse.ArgumentParser) -> None:
    data = "data sets' folders, or folders of such"
    parser.add_argument("--data", type=path, required=True, nargs="+", metavar="DIR", help=data)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")


def _mmvp_vlm(args: Any) -> None:
    from llava_genhancer.evaluate.mmvp.measure import run

    batch, device = args.batch_size, args.device
    run(args.towers, args.data, output=args.output, batch_size=batch, device=device, locals_too=args.locals)


def _zero_shot(args: Any) -> None:
    from llava_genhancer.evaluate.zero_shot.measure import run

    run(args.towers, args.data, output=args.output, batch_size=args.batch_size, device=args.device)


def _curve(args: Any) -> None:
    from llava_genhancer.evaluate.curve import run

    run(
        args.towers,
        args.data,
        args.mmvp,
        scales=args.lora_scale,
        output=args.output,
        batch_size=args.batch_size,
        device=args.device,
    )


def _generation(args: Any) -> None:
    from llava_genhancer.evaluate.generation import measure
    from llava_genhancer.evaluate.report.generation_section import FIGURE, RESULT

    measure(args.run_dir, args.data, args.device)
    print(f"results: {Path(args.run_dir) / RESULT}\nfigure:  {Path(args.run_dir) / 'figures' / FIGURE}")


def _probes(args: Any) -> None:
    from llava_genhancer.run import write_json
    from llava_genhancer.toyworld.probes import run_probes

    write_json(args.output, run_probes(args.towers))
    print(f"results: {args.output}")


def _questions(args: Any) -> None:
    from llava_genhancer.evaluate.questions import run

    run(
        args.checkpoints,
        args.data,
        args.output,
        labels=args.labels,
        template=args.conversation,
        batch_size=args.batch_size,
        device=args.device,
    )


def _mllm(args: Any) -> None:
    from llava_genhancer.evaluate.mllm.measure import evaluate

    evaluate(
        args.checkpoints,
        args.output_dir,
        labels=args.labels,
        tasks=args.tasks,
        data=args.data,
        batch_size=args.batch_size,
        processes=args.processes,
        limit=args.limit,
        model_args=args.model_args,
    )


def _report(args: Any) -> None:
    from llava_genhancer.evaluate.report.write import write_report

    run_dir, *others = map(Path, args.run_dirs)
    if (run_dir / "tower").is_dir() and (run_dir / "manifest.json").is_file():
        from llava_genhancer.enhance.export import write_card

        write_card(run_dir / "tower", run_dir)  # it says what was measured
    report = write_report(run_dir, others, baseline=args.baseline)
    print(f"report:   {report}, and as one page {report.with_suffix('.html')}\npictures: {report.parent / 'figures'}")
