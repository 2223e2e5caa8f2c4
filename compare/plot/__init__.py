"""Pictures of a comparison: `pictures/` has one class per kind, the other files what the kinds share.

axes           Inside the axes: reference lines with their bands, lines, error bars, markers, ticks
captions       The texts of a picture: title, subtitle, caption, and the description for those who cannot see it
distributions  Which models a picture of distributions shows: boxes from quantiles, lines from histograms and over
               positions
figure         Renders a picture: `render` returns the bytes of a file, `show` opens a window
header         Everything around the axes: title, subtitle and legend above, caption below, and the room left for
               the axes
kind           What a kind of picture is: one class in one file of `compare/plot/pictures/`
label_places   Where labels go: each on its cheapest place near its point, given the places of the others
labels         Labels of points and reference lines, with leaders where a label had to move away
lines          One line per model: strokes that can be told apart, and a legend beside the axes
series         What is drawn: lines of comparable points, single points, baseline lines, and messages on what is
               left out
style          Colours and text sizes of the pictures, light and dark
pictures/      the kinds of picture, one class per file
"""
