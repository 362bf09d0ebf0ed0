"""The conformance suite: what every strategy must keep to, whatever it does (`clplatform check strategy=…`)."""
