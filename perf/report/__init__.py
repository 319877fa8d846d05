"""What a run came to, for people: on a terminal, as a web page, as pictures.

    units.py     metrics in the units in which people speak of them
    digest.py    a run's figures, each computed once, and the verdicts upon them
    theme.py     one colour a server, for both themes of the page and for pictures
    plots.py     the kinds of plot, as altair builds them
    charts.py    which of them a run has, and PNG files of them
    table.py     the terminal
    view.py      what the page shows, in words
    page.py      the page: page.html.j2 (a template), page.css, page.js

All of it is generic over suites: what a metric is called and measured in is all that is known.
"""
