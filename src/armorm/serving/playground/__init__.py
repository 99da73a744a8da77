"""Web page that scores responses, shows why, and previews other objective weights (`armorm serve --ui`)."""
