"""Reading and writing autoencoders in the formats of other tools.

`SAE.from_pretrained` finds out whose files it was given (`detect`). SAELens's, which is ours too, has a
module of its own (`saelens`); every other tool is one row of the table in `foreign`, read by the code in
`table`, its normalisations folded into the weights by `folds`. What cannot be exactly one of our
architectures is refused with a sentence, above all what normalises each token by itself.

| tool | files | theirs → ours | folded, refused |
| --- | --- | --- | --- |
| SAELens 5, 6 | cfg.json, sae_weights.safetensors | standard → relu, topk, jumprelu | scale, row norms |
| sparsify | cfg.json, sae.safetensors | topk; transcode → topk_(skip_)transcoder | old skip: b_dec |
| dictionary_learning | config.json, ae.pt | AutoEncoder(New) → relu, TopK → topk, | AutoEncoder: row norms |
| | | BatchTopK, Matryoshka, JumpReLU → jumprelu, | |
| | | Gated → gated | |
| Gemma Scope | params.npz | jumprelu | embeddings: √d |
| Gemma Scope 2 | config.json, params.safetensors | jump_relu → jumprelu, | |
| | | transcoder → jumprelu_(skip_)transcoder | |
| Llama Scope | hyperparams.json, checkpoints/ | jumprelu, topk, relu | mean norm, row norms |
| Llamascopium | config.json, sae_weights.safetensors | jumprelu, topk, relu; | mean norm, row norms |
| | | relu crosscoder → crosscoder | other crosscoders refused |
| OpenAI | one .pt | ReLU → relu | TopK refused: layer norm |
| OpenSAE | config.json, model.safetensors | topk | input_normalize refused |
| Qwen Scope | layerN.sae.pt, k in the folder's name | topk | |
| Goodfire | one .pt or .pth | ReLU → relu | |

SAELens stores BatchTopK and Matryoshka as jumprelu. Where row norms are folded, a code is ours times the
length that its decoder row had there. Written are SAELens's format (`saelens`) and sparsify's (`sparsify`);
dictionary_learning's and the other .pt files are pickles, which unbraid does not write.
"""
