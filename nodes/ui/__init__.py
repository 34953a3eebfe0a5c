"""The local page, `veilmart ui`: what querier and owner look at, in a browser on their own machine (docs/reuse.md 6, docs/operate.md).

`door` decides who may enter, `work` runs what takes long, `views` gives the facts of each page and starts work, `pictures` draws,
`application` puts them together with the base that the market's page shares (protocol/web/).
"""
