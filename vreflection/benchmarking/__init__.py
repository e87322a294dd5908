"""What benchmark runs leave behind: raw rows, tables, plots, and whether a newer run is slower. Needs no torch."""
