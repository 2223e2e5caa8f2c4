"""Self-contained HTML: interactive plot and report page. It fetches nothing; no text of a result file runs.

answers       The report's section on answers: which of them changed against the full-precision model, task by task
build         Puts a page together: the interactive plot alone, or the whole report
content       What the sections of the report hold, as plain text; the templates escape it and give it its markup
divergence    The report's section on divergence from a reference: plots, figures, and tables by the reference's
              confidence
domains       The report's section on domains: a row a model, a column a domain
family_notes  What a reader should know of each family before comparing its numbers with another's; one row per
              family
page          The frame of a self-contained page: content security policy, colours, script
pictures      A picture inside a page: matplotlib's SVG, its colours made variables of the page, with spots to
              point at
positions     The report's section on the position in the window: a picture and a table per metric that files have by
              position
templating    The templates of the pages: autoescaped, so that a label of a result file is text wherever it stands
templates/    jinja2 templates of the pages
"""
