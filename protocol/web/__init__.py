"""What both web surfaces are made of: the market's page (market_node/page/) and a user's own (`veilmart ui`, nodes).

`site` makes pages: one view gives facts, a template shows them to people and `.json` gives the same facts to programs.
`headers` keeps a browser from running or fetching anything that does not come from here.
`forms` reads what a browser sends, `picture` draws, and static/ and templates/ hold the look of all of them.

Only these modules import Starlette and Jinja2; nothing else of the protocol imports them, so a verifier needs neither.
"""
