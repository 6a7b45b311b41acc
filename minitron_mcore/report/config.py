"""Recipe section `report`."""

from typing import Optional

from minitron_mcore.keys import PathName, key, section


@section
class ReportConfig:
    """The page of a run."""

    output: Optional[PathName] = key(None, "file to write; null: report.html in the folder", may_change=True)
