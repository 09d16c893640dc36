// Greedy continuations by llama.cpp: node greedy.mjs {"modules", "model", "adapter", "prompts": [[id]], "count"}
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const asked = JSON.parse(process.argv[2]);
const entry = createRequire(`${asked.modules}/`).resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);
const llama = await getLlama({gpu: false, maxThreads: 1, build: "never", progressLogs: false, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: asked.model});
const lora = asked.adapter ? {adapters: [{filePath: asked.adapter, scale: 1}]} : undefined;
const context = await model.createContext({contextSize: 256, threads: 1, lora});
const sequence = context.getSequence();
const found = [];
for (const prompt of asked.prompts) {
    const tokens = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === asked.count) break;
    }
    found.push(tokens);
    await sequence.clearHistory();
}
console.log(JSON.stringify(found));
process.exit(0);
