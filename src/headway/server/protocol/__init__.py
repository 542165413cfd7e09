"""What comes in and what goes out, as JSON: OpenAI's shapes, read strictly."""
