"""The front-end's side of vhost-user, as far as a measurement needs it. It blocks."""
