"""What an operator may set: environment variables named CONCORD_<FIELD>, or the command line's options over them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model import bundle
from model.runtime import Device

PREFIX = "CONCORD_"


class Settings(BaseSettings):
    """Frozen once read. Sizes in bytes, times in milliseconds; the limits are promises to the other callers of one process."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on. 0.0.0.0 listens to the whole network.")
    port: int = Field(8000, ge=0, le=65535, description="0 takes any free port; the log names it.")
    bundle: str = Field(
        bundle.DEFAULT_BUNDLE, min_length=1, description="Name of a built-in bundle, or path of a bundle's folder."
    )
    bundles: Path | None = Field(
        None, description="Folder of bundles' folders, all of which are served; instead of CONCORD_BUNDLE."
    )
    default_model: str | None = Field(
        None,
        min_length=1,
        description="What answers where a request names no model: name or name@version. One name needs none.",
    )
    watch_seconds: float = Field(
        5.0, ge=0, le=86_400, description="Between two looks whether a bundle changed on disk. 0: only at SIGHUP."
    )
    device: Device = Field("auto", description="auto takes CUDA where it can be had; cuda fails where it cannot.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of one operator. 0: one for each core it may use.")
    decode_threads: int = Field(2, ge=1, le=256, description="Threads that parse bodies and decode pictures.")
    max_body_bytes: int = Field(32 << 20, ge=1024, description="Largest request body.")
    max_bodies_bytes: int = Field(256 << 20, ge=1024, description="Bodies held at one time; above it requests get 503.")
    max_items: int = Field(32, ge=1, description="Most items in one request.")
    max_pixels: int = Field(16_000_000, ge=1, description="Largest picture, width times height, before it is scaled.")
    max_samples: int = Field(256, ge=1, description="Most values generated in one request: items x targets x num_samples.")
    max_refine_steps: int = Field(64, ge=0, description="Most refinement steps of one item.")
    max_queue_items: int = Field(512, ge=1, description="Items that may wait; above it requests get 503.")
    max_queue_ms: int = Field(
        5_000, ge=1, le=3_600_000, description="Longest wait that is foreseen; above it requests get 503."
    )
    max_batch: int = Field(32, ge=1, description="Most items in one run of a graph.")
    api_keys_file: Path | None = Field(None, description="File of API keys, one a line: service/keys.py. None: open to all.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Names that the Host header may have, parted by commas. Empty: any."
    )
    metrics: bool = Field(True, description="false closes /metrics.")
    docs: bool = Field(True, description="false closes /openapi.json.")
    page: bool = Field(True, description="false closes the page at /.")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Moves /metrics and /openapi.json to this port, where no key is asked for."
    )
    request_timeout_ms: int = Field(20_000, ge=1, le=3_600_000, description="Longest time of a request; then it gets 504.")
    head_timeout_ms: int = Field(10_000, ge=1, le=3_600_000, description="Longest time until a request's headers are there.")
    drain_delay_ms: int = Field(
        5_000, ge=0, le=3_600_000, description="After SIGTERM: serve on for so long, so that balancers see /readyz fail first."
    )
    grace_ms: int = Field(20_000, ge=1, le=3_600_000, description="Then: finish what is in flight for so long at most.")
    circuit_failures: int = Field(5, ge=1, description="Batches that all fail, in a row, before requests get 503 at once.")
    circuit_probe_ms: int = Field(
        2_000, ge=1, le=3_600_000, description="Then: between two looks whether the model works again."
    )
    heartbeat_ms: int = Field(
        5_000,
        ge=1000,
        le=3_600_000,
        description="An inference thread that is silent for longer fails /livez: many times one run.",
    )
    otel: str | None = Field(
        None, pattern=r"^https?://", description="OpenTelemetry collector, http://localhost:4318. None: no traces."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug logs every request.")
    log_format: Literal["json", "text"] = Field("json", description="text is for people at a terminal.")

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _parted_by_commas(cls, value: object) -> object:
        return tuple(name.strip().lower() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _a_request_fits(self) -> "Settings":
        if self.max_items > self.max_queue_items:
            raise ValueError(f"max_items={self.max_items} is more than max_queue_items={self.max_queue_items} can ever hold")
        if self.max_body_bytes > self.max_bodies_bytes:
            raise ValueError(f"max_body_bytes={self.max_body_bytes} is more than max_bodies_bytes={self.max_bodies_bytes}")
        return self

    def bundle_folders(self) -> list[Path]:
        """Folders of the bundles to serve, in the order of their names.

        Raises:
            bundle.BundleError: there is none.
        """
        if self.bundles is None:
            return [self.bundle_path()]
        found = sorted(file.parent for file in self.bundles.glob(f"*/{bundle.MANIFEST}") if file.parent.name[0] != ".")
        if not found:
            raise bundle.BundleError(f"{self.bundles}: holds no bundles, which are folders with a {bundle.MANIFEST}")
        return found

    def bundle_path(self) -> Path:
        """Folder of the bundle: a path where one is given (it has a separator or exists), else a built-in name.

        Raises:
            bundle.BundleError: neither.
        """
        path = Path(self.bundle)
        return path if "/" in self.bundle or path.is_dir() else bundle.builtin(self.bundle)


def explain(error: ValidationError) -> str:
    """One line for each bad setting: its variable, what was received and what is allowed."""
    lines = []
    for fault in error.errors(include_url=False):
        if fault["loc"]:
            name = str(fault["loc"][0])
            about = Settings.model_fields[name].description
            lines.append(f"{PREFIX}{name.upper()}={fault['input']}: {fault['msg']}. {about}")
        else:
            lines.append(fault["msg"])
    return "\n".join(lines)
