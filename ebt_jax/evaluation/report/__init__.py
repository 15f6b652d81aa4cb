"""A report of runs: one HTML file that shows what they learnt and how they think.

`make.make_report` reads workdirs (`runs`), looks into their models (`thinking`), and
writes the page (`page`): HTML with its style, scripts and numbers inside.
"""
