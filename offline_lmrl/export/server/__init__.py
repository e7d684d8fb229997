"""An HTTP server with the routes of OpenAI's API, which plays a run: `serving` starts it, `app` holds the routes."""
