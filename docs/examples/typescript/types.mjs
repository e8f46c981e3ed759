/** Makes protocol.ts from the published JSON Schema: an interface for each type, and two (Methods and
 * Events) that say which types a method and an event have. */
import { readFileSync, writeFileSync } from "node:fs";
import { compile } from "json-schema-to-typescript";

const { $defs, methods, events } = JSON.parse(readFileSync("../../reference/protocol.schema.json", "utf8"));
const object = (properties, title) => ({ type: "object", properties, required: Object.keys(properties), title });
const each = (entries, schemaOf) =>
  Object.fromEntries(Object.entries(entries).map(([name, entry]) => [name, schemaOf(entry)]));
const root = {
  ...object({
    Request: { $ref: "#/$defs/Request" },
    Response: { $ref: "#/$defs/Response" },
    Event: { $ref: "#/$defs/Event" },
    methods: object(each(methods, ({ params, result }) => object({ params, result })), "Methods"),
    events: object(each(events, ({ payload }) => payload), "Events"),
  }),
  $defs,
};
writeFileSync("protocol.ts", await compile(root, "Protocol", { additionalProperties: false, format: false }));
