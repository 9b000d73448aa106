"""How attention shares are drawn: `shares.js`, for the page of the monitor and for the report of a trace."""
