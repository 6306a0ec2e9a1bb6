// Looks slots up in a running pool, from the .proto files alone.
//
//   node lookup.js PROTOS_FOLDER ADDRESS TABLE TOPK < queries.json      queries: [B][H][D] numbers
//
// Prints {view, ids, scores, weights, values} as JSON: what GetTable says of the table, and the lookup's tensors.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const fs = require("fs");

const [protos, address, table, topk] = process.argv.slice(2);
const definition = loader.loadSync(
  ["mempool/wire/v1/data.proto", "mempool/wire/v1/pool.proto"],
  { includeDirs: [protos], keepCase: true, longs: Number, enums: String, defaults: true },
);
const wire = grpc.loadPackageDefinition(definition).mempool.wire.v1;
const options = { "grpc.max_receive_message_length": 256 * 2 ** 20 };
const memory = new wire.MemoryService(address, grpc.credentials.createInsecure(), options);
const pool = new wire.PoolService(address, grpc.credentials.createInsecure(), options);

function call(client, method, request) {
  const deadline = new Date(Date.now() + 20_000);
  return new Promise((resolve, reject) =>
    client[method](request, { deadline }, (error, reply) => (error ? reject(error) : resolve(reply))),
  );
}

// Tensors are little-endian and in C order; so are typed arrays on every machine Node runs on.
function floats(nested) {
  const shape = [];
  for (let level = nested; Array.isArray(level); level = level[0]) shape.push(level.length);
  const body = Buffer.from(Float32Array.from(nested.flat(Infinity)).buffer);
  return { dtype: "DTYPE_FLOAT32", shape, inline: body };
}

function numbers(tensor) {
  const raw = Uint8Array.from(tensor.inline).buffer;
  const flat =
    tensor.dtype === "DTYPE_INT64" ? Array.from(new BigInt64Array(raw), Number) : Array.from(new Float32Array(raw));
  return { shape: tensor.shape, data: flat };
}

async function main() {
  const queries = JSON.parse(fs.readFileSync(0, "utf8"));
  const { view } = await call(pool, "GetTable", { name: table });
  const reply = await call(memory, "Lookup", { table, topk: Number(topk), queries: floats(queries) });
  const { ids, scores, weights, values } = reply;
  console.log(
    JSON.stringify({
      view: { num_slots: view.schema.num_slots, value_dim: view.schema.value_dim, epoch: view.placement.epoch },
      ids: numbers(ids),
      scores: numbers(scores),
      weights: numbers(weights),
      values: numbers(values),
    }),
  );
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(`${grpc.status[error.code] ?? "ERROR"}: ${error.details ?? error}`);
    process.exit(1);
  },
);
