"""The front-end's side of vhost-user, with the loads of the C drivers on top. It blocks."""
