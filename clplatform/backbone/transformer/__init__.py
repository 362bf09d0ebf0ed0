"""A Transformer from scratch, to read from top to bottom:

    config.py           what a layer is made of
    positions.py        sinusoidal, learned and rotary positions
    cache.py            keys and values that decoding has computed already
    attention.py        attention, its masks, and several heads of it
    layers.py           the residual sub-layer, the feed-forward network, encoder and decoder layers, a stack of them
    embeddings.py       token embeddings with positions
    encoder.py          an encoder: every token sees every other
    decoder.py          a causal decoder, and the language model that it makes
    encoder_decoder.py  both, joined by cross-attention
    decoding.py         the state of a batch of texts that is being written
    generate.py         greedy search and sampling
    beam.py             beam search
    convert.py          weights of Hugging Face's BERT, GPT-2 and BART
    text.py, image.py   backbones for the platform

Names of tensors end in their shape, one letter for each dimension: x_BTD is [batch, tokens, model size]. Every file has
the letters that it uses at its top.
"""
