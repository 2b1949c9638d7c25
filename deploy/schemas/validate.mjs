// Checks custom resources: node validate.mjs NODE_MODULES <objects.json >errors.json
//
// Takes a JSON list of objects and writes a list of strings, empty if all is well. The
// validators of @kubernetes-models are made from the operators' own types, and pass over
// fields that they do not know. They read every field that they know, though: a field that
// was never read is one that the operator does not have, and an error here.
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "monitoring.coreos.com/v1": "prometheus-operator",
  "keda.sh/v1alpha1": "keda",
};

async function validatorOf({ apiVersion, kind }) {
  const version = apiVersion.split("/")[1];
  const ending = `${version[0].toUpperCase()}${version.slice(1)}${kind}.js`;
  const folder = join(
    process.argv[2], "@kubernetes-models", PACKAGES[apiVersion] ?? apiVersion, "_schemas",
  );
  const [file] = readdirSync(folder).filter((name) => name.endsWith(ending));
  if (!file) throw new Error(`There is no schema of ${apiVersion} ${kind}.`);
  return (await import(pathToFileURL(join(folder, file)))).validate;
}

function watched(value, path, unread) {
  if (typeof value !== "object" || value === null) return value;
  const inner = new Map();
  for (const key of Object.keys(value)) {
    const place = `${path}/${key}`;
    unread.add(place);
    inner.set(key, watched(value[key], place, unread));
  }
  return new Proxy(value, {
    get(target, key) {
      if (!inner.has(key)) return target[key];
      unread.delete(`${path}/${key}`);
      return inner.get(key);
    },
  });
}

const errors = [];
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const validate = await validatorOf(object);
  const unread = new Set();
  const name = `${object.kind} ${object.metadata?.name}`;
  if (!validate(watched(object, "", unread)))
    for (const { instancePath, message, keyword, params } of validate.errors)
      errors.push(`${name}${instancePath}: ${message ?? keyword} ${JSON.stringify(params)}`);
  // Of a field that is unknown itself, what is in it need not be named.
  for (const place of unread)
    if (![...unread].some((other) => place.startsWith(`${other}/`)))
      errors.push(`${name}${place}: unknown field`);
}
process.stdout.write(JSON.stringify(errors));
