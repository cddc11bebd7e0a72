"""The documentation is built without warnings, and every page of it works in a browser, without a network."""

import functools
import html
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT

WIDTHS = (1280, 400)
"""A laptop's and a phone's."""

DRIVER = """<body><script>
const pages = PAGES, widths = WIDTHS, results = [];
const ids = {};
async function idsOf(url) {  // of a page's elements, null where there is no page
    if (!(url in ids)) {
        const response = await fetch(url);
        const parsed = response.ok && new DOMParser().parseFromString(await response.text(), "text/html");
        ids[url] = parsed ? new Set([...parsed.querySelectorAll("[id]")].map(element => element.id)) : null;
    }
    return ids[url];
}
function background(inside, theme) {  // how bright a page is, 0 to 255
    inside.body.dataset.theme = theme;
    const color = inside.defaultView.getComputedStyle(inside.body).backgroundColor.match(/[\\d.]+/g).map(Number);
    return (color[0] + color[1] + color[2]) / 3;
}
async function look(page) {
    const frame = document.createElement("iframe");
    frame.style.width = widths[0] + "px";
    frame.style.height = "900px";
    frame.src = page;
    const loaded = new Promise(resolve => frame.onload = resolve);
    document.body.append(frame);
    await loaded;
    const inside = frame.contentDocument, math = frame.contentWindow.MathJax;
    if (math && math.startup) await math.startup.promise;
    const links = [...inside.querySelectorAll("a[href]")].map(link => new URL(link.href));
    const broken = [];
    for (const link of links.filter(link => link.origin == location.origin)) {
        const found = await idsOf(link.origin + link.pathname), anchor = decodeURIComponent(link.hash.slice(1));
        if (!found || (anchor && !found.has(anchor))) broken.push(link.pathname + link.hash);
    }
    const overflow = [];
    for (const width of widths) {
        frame.style.width = width + "px";
        overflow.push(inside.documentElement.scrollWidth - width);  // asking for it lays the page out anew
    }
    results.push({
        page, broken, overflow, links: links.length,
        formulas: inside.querySelectorAll(".math").length,
        raw: [...inside.querySelectorAll(".math")].filter(formula => !formula.querySelector("mjx-container")).length,
        pictures: [...inside.images].filter(image => !image.naturalWidth).map(image => image.src),
        title: inside.title,
        dark: background(inside, "dark"), light: background(inside, "light"),
    });
    frame.remove();
}
(async () => {
    for (const page of pages) await look(page);
    const pre = document.createElement("pre");
    pre.textContent = JSON.stringify(results);
    document.body.append(pre);
    document.title = "done";
})();
</script></body>
"""
"""Opens every page in a frame, and reports what is wrong with it."""


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and keeps no log."""

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as HTML."""
    pytest.importorskip("sphinx")  # not with the oldest versions
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_documentation_is_built_without_warnings(site):
    assert "K-efficient policy" in (site / "api.html").read_text()
    assert "critic_contrast" in (site / "algorithm.html").read_text()


def test_nothing_comes_from_the_network(site):
    """Renderer of formulas, styles and scripts included."""
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)\"", page.read_text())
        assert not loaded, page.name


def dumped(folder, page):
    """A page of a folder as a browser shows it, and what it writes to its console."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr"]
    url = "http://{}:{}/{}".format(*server.server_address, page)
    command = [browser, *options, "--virtual-time-budget=600000", "--dump-dom", url]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    finally:
        server.shutdown()
    return result.stdout, [line for line in result.stderr.splitlines() if ":CONSOLE" in line]


def opened(folder, pages):
    """What a browser finds on pages of a folder, and what it writes to its console."""
    (folder / "driver.html").write_text(DRIVER.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS)))
    shown, console = dumped(folder, "driver.html")
    found = re.search(r"<pre>(.*)</pre>", shown, flags=re.S)
    assert found, shown[-500:] + "\n".join(console)
    return json.loads(html.unescape(found[1])), console


def test_every_page_works_in_a_browser(site):
    """At a laptop's and a phone's width: formulas, pictures, links, no line beyond the edge, nothing in the console."""
    pages = sorted(page.name for page in site.glob("*.html") if page.name != "driver.html")
    found, console = opened(site, pages)
    assert not console
    assert len(found) == len(pages) > 15
    assert sum(page["links"] for page in found) > 500 and sum(page["formulas"] for page in found) > 50
    for page in found:
        assert not page["broken"] and not page["pictures"] and page["raw"] == 0 and page["title"], page
        assert max(page["overflow"]) <= 0, page
        assert page["dark"] < 60 and page["light"] > 200, page


def test_search_finds_pages(site):
    """Without a network; a word that is nowhere finds nothing."""
    found, console = dumped(site, "search.html?q=candidates")
    links = re.findall(r'<li[^>]*>\s*<a href="([\w.]+)', found)
    assert {"algorithm.html", "hyperparameters.html"} <= set(links), found[-2000:]
    assert not console
    nothing, _ = dumped(site, "search.html?q=xylophone")
    assert not re.findall(r'<li[^>]*>\s*<a href="(algorithm.html)', nothing[nothing.index("search-results") :])


def test_faults_of_a_page_are_noticed(tmp_path):
    (tmp_path / "page.html").write_text(
        "<title>x</title><h1 id='there'>x</h1><a href='nowhere.html'></a><a href='#nothing'></a><a href='#there'></a>"
        "<img src='none.png'><span class='math'>x</span><div style='width: 1500px'>x</div><script>nothing()</script>"
    )
    found, console = opened(tmp_path, ["page.html"])
    assert "nothing is not defined" in "".join(console)
    (page,) = found
    assert page["overflow"] == pytest.approx([220, 1100], abs=20) and page["raw"] == 1 and len(page["pictures"]) == 1
    assert page["broken"] == ["/nowhere.html", "/page.html#nothing"]
