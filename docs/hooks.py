"""What mkdocs adds to these pages: some that lie outside this folder, and the README's tables."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/kernels.md"
PLOTS = "benchmarks/results/*/*.png"
TABLES = re.compile(r"<!-- bench:begin -->\n(.*?)<!-- bench:end -->", re.S)


def on_files(files, config):
    for path in [*map(ROOT.joinpath, PAGES), *ROOT.glob(PLOTS)]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri == "performance.md":
        (tables,) = TABLES.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        markdown = markdown.replace("<!-- tables -->", tables)
    return markdown.replace("](../", "](")
