"""Reports for every reader: text for the terminal and pytest, JSON for machines, one HTML page for a browser.

A new format is a file here with a function of a `CandidateReport`. It is written by `cli/verify.py`, `cli/compare.py`
and `testing/suite/judging.py`.
"""

from vit_ref.files import write as write
from vit_ref.verify.report.document import SCHEMA as SCHEMA
from vit_ref.verify.report.document import to_json as to_json
from vit_ref.verify.report.page import to_html as to_html
from vit_ref.verify.report.text import closing as closing
from vit_ref.verify.report.text import excerpt as excerpt
from vit_ref.verify.report.text import explain as explain
from vit_ref.verify.report.text import headline as headline
from vit_ref.verify.report.text import in_full as in_full
from vit_ref.verify.report.text import sections as sections
from vit_ref.verify.report.text import summary as summary
from vit_ref.verify.report.text import table as table
