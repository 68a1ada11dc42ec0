// Classify texts with an exported model in JavaScript (npm install @huggingface/transformers):
//
//     node examples/classify.mjs results/first/student_onnx fp32 "ভিডিওটা ভালো লাগলো"
//
// The second argument is fp32, or q8 for the int8 model. Prints one JSON object a text: {label: probability}.
//
// pipeline("text-classification") does the same for texts that are short enough. It cuts longer ones with their closing
// token, which the model was trained to see, so here they are cut in front of it.

import { readFileSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { AutoModelForSequenceClassification, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

const [folder, dtype, ...texts] = process.argv.slice(2);
const path = resolve(folder);
const settings = JSON.parse(readFileSync(join(path, "classifier.json"), "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(path);

const tokenizer = await AutoTokenizer.from_pretrained(basename(path));
const model = await AutoModelForSequenceClassification.from_pretrained(basename(path), { dtype });
const closing = tokenizer.encode("").at(-1); // undefined where a tokenizer puts nothing around a text
const form = settings.text_normalization;

for (const text of texts) {
  const normalised = (form === "none" ? text : text.normalize(form.toUpperCase())).trim();
  let ids = tokenizer.encode(normalised);
  if (ids.length > settings.max_length) {
    ids = ids.at(-1) === closing ? [...ids.slice(0, settings.max_length - 1), closing] : ids.slice(0, settings.max_length);
  }
  const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const { logits } = await model({ input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) });
  const probs = logits.sigmoid().tolist()[0];
  console.log(JSON.stringify(Object.fromEntries(settings.labels.map((label, place) => [label, probs[place]]))));
}
