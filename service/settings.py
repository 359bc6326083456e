"""Settings: environment variables named CONCORD_<FIELD>, and the command line's options, which take precedence."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from concord.model import bundle
from concord.model.runtime.device import DEVICE_PATTERN

PREFIX = "CONCORD_"


class Settings(BaseSettings):
    """Read once, then frozen. Sizes are in bytes and times in milliseconds unless the name says otherwise. An empty variable is
    the same as an unset one."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on. 0.0.0.0 listens on every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0: any free port, which the log names.")
    workers: str = Field(
        "1",
        description="Processes that serve one port. auto: one for each core (CONCORD_THREADS, if set), at most 4 on a GPU.",
    )
    ready_share: float = Field(0.5, gt=0, le=1, description="Share of the workers that must be ready for /readyz to pass.")
    bundle: str = Field(
        bundle.DEFAULT_BUNDLE, min_length=1, description="Name of a built-in bundle, or path of a bundle's folder."
    )
    bundles: Path | None = Field(
        None, description="Folder whose subfolders are bundles. All are served. It replaces CONCORD_BUNDLE."
    )
    default_model: str | None = Field(
        None,
        min_length=1,
        description="name or name@version, for requests without `model`. Required if several names are served.",
    )
    watch_seconds: float = Field(
        5.0, ge=0, le=86_400, description="Seconds between two checks for changed bundles. 0: only at SIGHUP."
    )
    device: str = Field(
        "auto",
        pattern=DEVICE_PATTERN,
        description="auto: CUDA if a row runs there, else the CPU. cuda or cuda:N (GPU number N): fail without it. cpu.",
    )
    gpu_memory_mb: int = Field(
        0,
        ge=0,
        description="Most GPU memory of each graph, in MiB; a bundle has three graphs and one for each modality. 0: no limit. "
        "Split between the workers.",
    )
    tf32: bool = Field(False, description="true: multiply in TF32 on a GPU, and allow golden examples to differ by 5e-3.")
    cuda_graphs: bool = Field(
        True, description="true: record the run of each graph at each batch size on a GPU, and replay it. No effect on a CPU."
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of one operator. 0: one for each core, at most 16; one on a GPU. "
        "Split between the workers on a CPU.",
    )
    decode_threads: int = Field(2, ge=1, le=256, description="Threads that parse request bodies.")
    max_body_bytes: int = Field(32 << 20, ge=1024, description="Largest request body.")
    max_bodies_bytes: int = Field(
        256 << 20,
        ge=1024,
        description="Largest size of all bodies in progress. Above it, requests get 503. Split between the workers.",
    )
    max_items: int = Field(32, ge=1, description="Maximum number of items in a request.")
    max_texts: int = Field(2048, ge=1, description="Maximum number of strings in a request to /v1/embeddings.")
    max_pixels: int = Field(16_000_000, ge=1, description="Largest picture before scaling: width times height.")
    max_audio_seconds: int = Field(60, ge=1, le=3600, description="Longest audio clip before it is trimmed, in seconds.")
    max_samples: int = Field(256, ge=1, description="Maximum number of generated values: items x targets x num_samples.")
    max_refine_steps: int = Field(64, ge=0, description="Maximum number of refinement steps of an item.")
    max_queue_items: int = Field(512, ge=1, description="Longest queue of a worker, in items. Above it, requests get 503.")
    max_queue_ms: int = Field(5_000, ge=1, le=3_600_000, description="Longest expected wait. Above it, requests get 503.")
    max_batch: int = Field(32, ge=1, description="Maximum number of items in one run of a graph.")
    api_keys_file: Path | None = Field(
        None, description="File of API keys: one `key [name] [items/s]` per line. None: no key is required."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Allowed names in the Host header, separated by commas. Empty: any."
    )
    metrics: bool = Field(True, description="false closes /metrics.")
    docs: bool = Field(True, description="false closes /openapi.json.")
    page: bool = Field(True, description="false closes the page at /.")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Moves /metrics and /openapi.json to this port, which requires no key."
    )
    request_timeout_ms: int = Field(
        20_000, ge=1, le=3_600_000, description="Longest duration of a request. After it, the request gets 504."
    )
    head_timeout_ms: int = Field(10_000, ge=1, le=3_600_000, description="Longest time until a request's headers have arrived.")
    drain_delay_ms: int = Field(
        5_000,
        ge=0,
        le=3_600_000,
        description="After SIGTERM: keep serving this long, so that balancers see /readyz fail first.",
    )
    grace_ms: int = Field(20_000, ge=1, le=3_600_000, description="After that: longest time for requests in flight.")
    circuit_failures: int = Field(5, ge=1, description="Consecutive failed batches after which requests get 503 at once.")
    circuit_probe_ms: int = Field(
        2_000, ge=1, le=3_600_000, description="After that: time between two self-tests of the model."
    )
    heartbeat_ms: int = Field(
        5_000,
        ge=1000,
        le=3_600_000,
        description="/livez fails if the heartbeat of the inference thread is older. Set it to many times one run.",
    )
    otel: str | None = Field(
        None, pattern=r"^https?://", description="OpenTelemetry collector, such as http://localhost:4318. None: no traces."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages that are logged. debug: also every request."
    )
    log_format: Literal["json", "text"] = Field("json", description="json for programs, text for people.")

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, value: str) -> str:
        if value != "auto" and not (value.isascii() and value.isdigit() and 1 <= int(value) <= 999):
            raise ValueError("workers is auto or a number from 1 to 999")
        return value

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        """IPv6 addresses lose their brackets, which a Host header has and people leave out."""
        if not isinstance(value, str):
            return value
        return tuple(name.strip().lower().strip("[]") for name in value.split(",") if name.strip())

    @model_validator(mode="after")
    def _a_request_fits(self) -> "Settings":
        if self.max_items > self.max_queue_items:
            raise ValueError(f"max_items={self.max_items} is more than max_queue_items={self.max_queue_items} can ever hold")
        if self.max_body_bytes > self.max_bodies_bytes:
            raise ValueError(f"max_body_bytes={self.max_body_bytes} is more than max_bodies_bytes={self.max_bodies_bytes}")
        return self

    def runtime_options(self) -> dict[str, Any]:
        """Keyword arguments of ``Runtime``."""
        names = ("device", "threads", "gpu_memory_mb", "tf32", "cuda_graphs", "max_batch")
        return {name: getattr(self, name) for name in names}

    def bundle_folders(self) -> list[Path]:
        """Folders of the bundles to serve, in the order of their names.

        Raises:
            bundle.BundleError: there are none.
        """
        if self.bundles is None:
            return [self.bundle_path()]
        found = sorted(file.parent for file in self.bundles.glob(f"*/{bundle.MANIFEST}") if file.parent.name[0] != ".")
        if not found:
            raise bundle.BundleError(f"{self.bundles}: holds no bundle: a bundle is a folder with a {bundle.MANIFEST}")
        return found

    def bundle_path(self) -> Path:
        """Folder of the bundle: ``bundle`` as a path if it has a separator or exists, else as the name of a built-in bundle.

        Raises:
            bundle.BundleError: it is neither.
        """
        path = Path(self.bundle)
        return path if "/" in self.bundle or path.is_dir() else bundle.builtin(self.bundle)


def explain(error: ValidationError) -> str:
    """One line for each invalid setting: its variable, what was received and what is allowed."""
    lines = []
    for fault in error.errors(include_url=False):
        if fault["loc"]:
            name = str(fault["loc"][0])
            about = Settings.model_fields[name].description
            lines.append(f"{PREFIX}{name.upper()}={fault['input']}: {fault['msg']}. {about}")
        else:
            lines.append(fault["msg"])
    return "\n".join(lines)
