// What the Hub's own code reads. JSON in on standard input: {"names": [...], "files": [...]}; JSON out.
import { readFileSync } from "node:fs";
import { gguf, parseGgufShardFilename } from "@huggingface/gguf";
import { GGUF_QUANT_RE_GLOBAL, GGMLFileQuantizationType, parseGGUFQuantLabel } from "@huggingface/tasks";

const asked = JSON.parse(readFileSync(0, "utf8"));
const names = asked.names.map((name) => ({
  label: parseGGUFQuantLabel(name) ?? null,
  labels: name.toUpperCase().match(GGUF_QUANT_RE_GLOBAL) ?? [],
  shard: parseGgufShardFilename(name),
}));
const files = [];
for (const file of asked.files) {
  const read = await gguf(file, { allowLocalFile: true, computeParametersCount: true });
  files.push({
    metadata: Object.fromEntries(Object.entries(read.metadata).filter(([, value]) => !Array.isArray(value))),
    tensors: read.tensorInfos.map((t) => [t.name, t.shape.map(Number), t.dtype]),
    parameters: read.parameterCount,
  });
}
const known = Object.values(GGMLFileQuantizationType).filter((value) => typeof value === "string");
process.stdout.write(JSON.stringify({ names, files, known }, (_, v) => (typeof v === "bigint" ? Number(v) : v)));
