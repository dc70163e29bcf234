// A server that answers to itself, a worker's result, a file.
const fs = require("fs"), http = require("http");
const { Worker, isMainThread, parentPort, workerData } = require("worker_threads");

if (!isMainThread) {
    let sum = 0;
    for (let n = 0; n < workerData; n++) sum += n;
    parentPort.postMessage(sum);
} else {
    const answers = [];
    const server = http.createServer((request, response) => {
        const chunks = [];
        request.on("data", (chunk) => chunks.push(chunk));
        request.on("end", () => response.end(`${request.method} ${request.url} ${Buffer.concat(chunks).length}`));
    });
    const ask = (number) =>
        new Promise((resolve, reject) => {
            const { port } = server.address();
            const request = http.request({ port, host: "127.0.0.1", method: "POST", path: `/${number}` }, (response) => {
                let text = "";
                response.on("data", (chunk) => (text += chunk));
                response.on("end", () => resolve(text));
            });
            request.on("error", reject);
            request.end(Buffer.alloc(number * 100000));
        });
    const work = (count) =>
        new Promise((resolve, reject) => new Worker(__filename, { workerData: count }).on("message", resolve).on("error", reject));
    server.listen(0, "127.0.0.1", async () => {
        answers.push(...(await Promise.all([0, 1, 2, 3].map(ask))));
        answers.push(...(await Promise.all([10, 100000].map(work))));
        await fs.promises.writeFile("/data/from-node", answers.join("\n"));
        const seen = await new Promise((resolve) => {
            fs.watch("/data", (_, name) => name === "watched" && resolve(name));
            fs.writeFileSync("/data/watched", "");
        });
        console.log(`${fs.readFileSync("/data/from-node")}\n${seen}`);
        process.exit(0);
    });
}
