"""What mkdocs adds to these pages: some that lie outside this folder."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/kernels.md"
PLOTS = "benchmarks/results/*/*.png"


def on_files(files, config):
    for path in [*map(ROOT.joinpath, PAGES), *ROOT.glob(PLOTS)]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they are in the site, where the pages of this folder are at the top."""
    if "/" in page.file.src_uri:
        return markdown.replace("](../docs/", "](../")
    return markdown.replace("](../", "](")
