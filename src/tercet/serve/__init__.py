"""An index over HTTP: the JSON interface, the page at `/`, and what keeps both within bounds.  Extra `serve`."""
