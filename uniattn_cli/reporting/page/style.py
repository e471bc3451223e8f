"""The style sheet of the page: light and dark, narrow and wide, screen and paper.

Every colour that carries text or lines has a contrast of at least 4.5 to the background (a test computes it). The
colours of the series can be told apart by people who see no red or no green, and each series has a shape of its own.
"""

from __future__ import annotations

LIGHT = {
    "page": "#ffffff",
    "panel": "#f4f5f7",
    "ink": "#1b1f24",
    "soft": "#565e68",
    "rule": "#d0d5db",
    "good": "#00664a",
    "bad": "#a83200",
    "even": "#3d4f66",
    "heat": "#0b5394",
    "s0": "#1b1f24",
    "s1": "#b04a00",
    "s2": "#0060a8",
    "s3": "#00704f",
    "s4": "#8f3f7f",
    "s5": "#7a5c00",
}
DARK = {
    "page": "#14171b",
    "panel": "#1e2329",
    "ink": "#eceff3",
    "soft": "#a9b2bd",
    "rule": "#3a424c",
    "good": "#4fd1a5",
    "bad": "#ff9a66",
    "even": "#a9c1e0",
    "heat": "#6db8f2",
    "s0": "#eceff3",
    "s1": "#ff9d57",
    "s2": "#6db8f2",
    "s3": "#4fd1a5",
    "s4": "#e59ad3",
    "s5": "#e3c04d",
}
SERIES = 6


def sheet() -> str:
    """The whole style sheet."""
    series = "".join(f".s{index}{{color:var(--s{index})}}" for index in range(SERIES))
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    return f":root{{{_variables(LIGHT)}}}\n{dark}\n{series}\n{RULES}"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1rem 1rem 3rem;max-width:62rem;background:var(--page);color:var(--ink);
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.4rem 0 .4rem;padding-top:.6rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.4rem 0 .3rem}
p{margin:.4rem 0 .8rem;max-width:44rem}
.soft,figcaption,dt{color:var(--soft)}
a{color:inherit}
nav ul{list-style:none;padding:0;margin:.4rem 0;display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:.8rem;margin:1rem 0}
.card{background:var(--panel);border-radius:.5rem;border-left:.4rem solid var(--even);padding:.7rem .9rem}
.card h3{margin:0;overflow-wrap:anywhere}
.card .word{font-weight:700;font-size:1.1rem;color:var(--even);margin:.1rem 0 .4rem}
.card.better{border-color:var(--good)}.card.worse{border-color:var(--bad)}
.better .word,.mark.better{color:var(--good)}.worse .word,.mark.worse{color:var(--bad)}
.card dl{display:grid;grid-template-columns:1fr auto;gap:.1rem .8rem;margin:.4rem 0;font-size:.93rem}
.card dd{margin:0;text-align:right;font-variant-numeric:tabular-nums;font-weight:600}
.card p{font-size:.9rem;margin:.5rem 0 0}
.scroll{overflow-x:auto;margin:.2rem 0 1.2rem;max-width:100%}
.scroll:focus-visible{outline:2px solid var(--even)}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
.caption{font-size:.95rem;margin:1.2rem 0 0}
th,td{padding:.35rem .7rem .35rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th,thead th:first-child{vertical-align:bottom;font-weight:700;border-bottom:2px solid var(--soft)}
th:first-child{text-align:left;font-weight:500;min-width:8rem}
td .sub{display:block;color:var(--soft);font-size:.85rem;white-space:nowrap}
td>data{white-space:nowrap}
.mark{font-weight:700;color:var(--even);white-space:nowrap}
.words td{text-align:left}
.words code{white-space:nowrap}
.path{display:block;min-width:9rem;overflow-wrap:anywhere}
.words thead th{text-align:left}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.5rem 1.6rem;margin:.8rem 0}
figure{margin:.5rem 0 1rem;min-width:0;break-inside:avoid}
figure svg{display:block;width:100%;height:auto;max-width:30rem;overflow:visible}
figcaption{font-size:.87rem;max-width:30rem;margin-top:.3rem}
svg text{font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--ink)}
svg .tick{fill:var(--soft)}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
svg .bar{stroke:currentColor;stroke-width:1.5}
svg .dot{fill:currentColor;stroke:var(--page);stroke-width:1}
svg .hollow{fill:var(--page);stroke:currentColor;stroke-width:1.5}
svg .label{fill:currentColor;font-weight:600;paint-order:stroke;stroke:var(--page);stroke-width:3px}
svg .limit{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3}
svg .heat{fill:var(--heat)}
svg .frame{fill:none;stroke:var(--s1)}
svg .halo{fill:none;stroke:var(--page)}
.legend{max-width:30rem;display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;padding:0;margin:.2rem 0;
 font-size:.87rem}
.legend svg{display:inline-block;width:1.9rem;height:.9rem;vertical-align:-.1rem}
.samples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr));gap:.8rem;
 margin:.5rem 0 1.4rem}
.samples h4{margin:0 0 .2rem;font-size:.9rem;overflow-wrap:anywhere}
.samples>div{min-width:0}
pre,.text{background:var(--panel);border-radius:.4rem;padding:.6rem .7rem;margin:.2rem 0;font-size:.86rem;
 white-space:pre-wrap;overflow-wrap:anywhere}
pre,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
pre{font-size:.82rem}
.prompt{border-left:.25rem solid var(--soft)}
details{margin:.6rem 0}
summary{cursor:pointer}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}.scroll{overflow:visible}
 h2,h3{break-after:avoid}.card,tr,.samples>div{break-inside:avoid}
 .plots{grid-template-columns:1fr 1fr}.card{border:1px solid var(--rule);border-left-width:.4rem}
 .heat,.card,.dot{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
