"""Self-contained HTML pages: everything inside the file, nothing fetched."""

from __future__ import annotations

from pathlib import Path

import jinja2

from fsdp_qlora.errors import ConfigError

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("fsdp_qlora", "pages"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: str, template: str, **values: object) -> None:
    """Write the page that a template of this folder makes of values, which are escaped; ConfigError if it cannot be."""
    page = _ENVIRONMENT.get_template(template).render(**values)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written ({error.strerror}); choose another file") from error
