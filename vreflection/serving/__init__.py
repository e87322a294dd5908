"""An OpenAI-compatible server on the latent decoder, and its page.

The way of a request: `app` takes it in and `schema` and `conversation` read it, for one of the interfaces `chat`,
`responses` and `completions`. What all of them ask for is an `answer_request`; `service` admits it, makes its prompts
(`prompts`) and hands them to the decoder's thread (`worker`). What the decoder emits comes back through
`service.AnswerService.events`, and the interface writes it as an object or as events (`interfaces`).
"""
