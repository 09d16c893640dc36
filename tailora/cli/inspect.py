"""`tailora inspect ADAPTER`: shows what an adapter learned in each layer, with advice for the next run."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt

from tailora.cli.flags import Json, Overwrite, flags_of, log_columns, merge_with_run
from tailora.cli.main import log, print_json, stderr, stdout
from tailora.cli.models import (
    AdapterPath,
    Device,
    Quantize,
    base_model_name,
    check_sources,
    device_of_flag,
    find_adapter,
    quantize_method,
)
from tailora.formats.run_folder import REPORT_FILES, check_result_folder, write_report
from tailora.report.files import write_page_if_possible
from tailora.report.terminal import print_page
from tailora.train.config import TrainConfig

Flags: Any = flags_of(TrainConfig, only=["field", "system", "max_length"])

Model = Annotated[
    str | None,
    Parameter(
        help="base model: folder or Hub id, or 'demo'; adds ||dW|| / ||W|| and intruder dimensions; default with "
        "--data: the one that the adapter names"
    ),
]
With = Annotated[str | None, Parameter(name="--with", help="second adapter of the same base model, to compare with")]
Data = Annotated[
    str | None, Parameter(help="held-out data, or 'demo'; measures how much the smaller singular values lower its loss")
]
Forgetting = Annotated[
    str | None, Parameter(help="texts unrelated to the task; default: texts that the base model writes")
]
OutputDir = Annotated[Path | None, Parameter(name="--output-dir", help="new folder for a report with all numbers")]


def inspect(
    adapter: AdapterPath,
    /,
    *,
    with_: With = None,
    model: Model = None,
    data: Data = None,
    forgetting_data: Forgetting = None,
    intruders: Annotated[bool, Parameter(help="count intruder dimensions (by far the slowest part)")] = True,
    quantize: Quantize = None,
    device: Device = "auto",
    seed: Annotated[NonNegativeInt, Parameter(help="seed for the random updates that intruders are compared with")] = 0,
    all_: Annotated[bool, Parameter(name="--all", negative=(), help="show a row for every module")] = False,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Show what an adapter learned in each layer, with advice for the next run.

    The adapter itself shows the rank and energy of every module. --model adds the size of each update relative to the
    base model's weights, and new directions. --data adds how much each part lowers the loss. The rules behind the
    advice are explained under "Inspecting an adapter" in the docs.
    """
    folder = find_adapter(adapter)
    second = None if with_ is None else find_adapter(with_)
    if output_dir is not None:
        check_result_folder(output_dir, REPORT_FILES, overwrite=overwrite)
    if model is not None or data is not None or forgetting_data is not None:  # the loss needs the base model
        model = base_model_name(model, [folder])
    check_sources(data=(data, forgetting_data))
    log("loading the adapter")
    from tailora.cli.progress import counter
    from tailora.report.pages.inspect import inspect_page
    from tailora.study.inspect import InspectOptions
    from tailora.study.inspect import inspect as run

    settings = merge_with_run(flags, folder, arguments={"data": data})
    if data is not None:
        log_columns(flags, settings)
    options = InspectOptions(
        data, settings.field, settings.max_length, forgetting_data, intruders, seed, settings.system
    )
    folders = [folder] if second is None else [folder, second]
    method = None if model is None else quantize_method(folders, quantize)
    chosen = None if model is None else device_of_flag(device)
    with counter(stderr(), "modules") as progress:
        inspection = run(
            folder,
            model,
            data,
            other=second,
            options=options,
            quantize=method,
            device=chosen,
            log=log,
            progress=progress,
        )
    if output_dir is not None:
        write_report(output_dir, "inspect", inspection.to_dict(), allow_nan=False)
        log(write_page_if_possible(output_dir))
    if json:
        print_json(inspection.to_dict())
    else:
        print_page(stdout(), inspect_page(inspection), everything=all_)
    return 0
