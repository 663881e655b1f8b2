"""Turn the configuration of another trainer into a job file: `import_config` reads it, `job_toml` writes it."""

from .apply import Imported, Line
from .convert import import_config
from .job_toml import job_toml, write_job

__all__ = ["Imported", "Line", "import_config", "job_toml", "write_job"]
