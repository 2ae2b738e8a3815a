// Tests of the page's modules that need no browser; test_chat_page.py runs them with `node --test`.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";
import vm from "node:vm";

import { fromJson, matches, newConversation, newMessage, titleOf, toJson, toMarkdown } from "./page/conversation.js";
import { failureOf } from "./page/failure.js";
import { tokensOf } from "./page/meter.js";
import { chatRequest, completionRequest } from "./page/request.js";
import { Settings } from "./page/settings.js";
import { events, EventSplitter } from "./page/sse.js";
import { MemoryStorage, Store } from "./page/store.js";

function chatOf(...contents) {
  const messages = contents.map((content, index) => newMessage(index % 2 ? "assistant" : "user", content));
  return { ...newConversation(), messages };
}

for (const name of readdirSync("page").filter((file) => file.endsWith(".js"))) {
  test(`${name} has valid syntax`, () => new vm.SourceTextModule(readFileSync(`page/${name}`, "utf8"), { identifier: name }));
}

test("events do not depend on chunk boundaries", async () => {
  const text = ": keep-alive\n\ndata: one\n\ndata:two\r\n\r\nevent: x\rdata: a\rdata: b\r\rdata: ü€😀\n\ndata: never ended";
  const bytes = new TextEncoder().encode(text);
  for (let size = 1; size <= bytes.length; size++) {
    const pieces = Array.from({ length: Math.ceil(bytes.length / size) }, (_, i) => bytes.slice(i * size, (i + 1) * size));
    const found = [];
    for await (const data of events(ReadableStream.from(pieces))) found.push(data);
    assert.deepEqual(found, ["one", "two", "a\nb", "ü€😀"], `in pieces of ${size}`);
  }
});

test("an event ends with an empty line", () => {
  const splitter = new EventSplitter();
  assert.deepEqual(splitter.push("data: a\n"), []);
  assert.deepEqual(splitter.push("\n"), ["a"]);
});

test("a conversation is restored from JSON under a new id", () => {
  const chat = { ...chatOf("Hello", "Hi"), name: "Greeting" };
  const [back] = fromJson(toJson([chat]));
  assert.notEqual(back.id, chat.id);
  assert.equal(back.name, "Greeting");
  assert.deepEqual(back.messages.map(({ role, content }) => [role, content]), [["user", "Hello"], ["assistant", "Hi"]]);
});

test("OpenAI's messages are imported with their system prompt", () => {
  const [chat] = fromJson('{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}');
  assert.deepEqual(chat.messages.map(({ role, content }) => [role, content]), [["system", "s"], ["user", "q"]]);
  assert.equal(titleOf(chat), "q");
});

test("text parts of imported messages are joined", () => {
  const parts = [{ type: "text", text: "a" }, { type: "text", text: "b" }];
  const [chat] = fromJson(JSON.stringify({ messages: [{ role: "user", content: parts }] }));
  assert.equal(chat.messages[0].content, "ab");
});

for (const [message, reason] of [
  [{ role: "user", content: [{ type: "image_url", image_url: { url: "x" } }] }, /content is not text/],
  [{ role: "assistant", content: null, tool_calls: [{ id: "1" }] }, /tool calls/],
  [{ role: "tool", content: "4" }, /tool calls/],
  [{ role: "robot", content: "4" }, /role/],
]) {
  test(`importing ${JSON.stringify(message)} reports why it fails`, () => {
    assert.throws(() => fromJson(JSON.stringify({ messages: [message] })), reason);
  });
}

test("a conversation's own system prompt replaces the one in the settings", () => {
  const settings = new Settings(new MemoryStorage());
  settings.update({ system: "Be short." });
  const [chat] = fromJson('{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}');
  assert.deepEqual(chatRequest(chat.messages, settings, "m").messages, [{ role: "system", content: "s" }, { role: "user", content: "q" }]);
});

for (const text of ["", "{", "null", "[1]", '{"messages": "x"}', '{"conversations": {}}', '{"messages": [{"role": "user"}]}', '[{"messages": [null]}]']) {
  test(`${text || "nothing"} is rejected with a message`, () => assert.throws(() => fromJson(text), /This file/));
}

test("unknown fields of a file are dropped", () => {
  const [chat] = fromJson('[{"messages": [], "text": 3, "created": "x", "evil": 1, "mode": "other"}]');
  assert.deepEqual([chat.text, chat.mode, chat.evil, typeof chat.created], ["", "chat", undefined, "number"]);
});

test("a title is the name, or the first line, shortened", () => {
  assert.equal(titleOf(chatOf()), "New chat");
  assert.equal(titleOf(chatOf("\n first \n second")), "first");
  assert.equal(titleOf(chatOf("x".repeat(100))).length, 60);
  assert.equal(titleOf({ ...chatOf("first"), name: "Name" }), "Name");
});

test("a search needs every word, anywhere", () => {
  const chat = chatOf("Lists in Python", "Use append.");
  assert.ok(matches(chat, "APPEND list") && matches(chat, ""));
  assert.ok(!matches(chat, "append tuple"));
});

test("Markdown has the roles as headings", () => {
  assert.equal(toMarkdown(chatOf("Hello", "Hi")), "# Hello\n\n## You\n\nHello\n\n## Bumblebee\n\nHi\n");
});

test("a request has the system prompt, non-empty messages and only the set options", () => {
  const settings = new Settings(new MemoryStorage());
  settings.update({ system: "Be short.", temperature: "0", seed: "7", top_p: "" });
  const { stream, stream_options, ...body } = chatRequest(chatOf("a", "", "b").messages, settings, "m");
  assert.deepEqual(body, {
    model: "m", temperature: 0, seed: 7,
    messages: [{ role: "system", content: "Be short." }, { role: "user", content: "a" }, { role: "user", content: "b" }],
  });
  assert.equal(stream && stream_options.include_usage, true);
  assert.equal(completionRequest("Once", settings, "m").prompt, "Once");
});

test("settings are stored, and the API key separately", () => {
  const storage = new MemoryStorage();
  const settings = new Settings(storage);
  settings.update({ temperature: "0.5" });
  settings.key = "secret";
  const again = new Settings(storage);
  assert.deepEqual([again.values, again.key], [{ temperature: 0.5 }, "secret"]);
  again.update({ temperature: "" });
  again.key = "";
  assert.deepEqual([new Settings(storage).values, storage.getItem("bumblebee.key")], [{}, null]);
});

test("a full storage is reported and loses nothing in memory", () => {
  const storage = new MemoryStorage();
  const store = new Store(storage);
  let told = 0;
  store.addEventListener("full", () => told++);
  storage.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };
  const chat = chatOf("kept");
  store.save(chat);
  assert.equal(told, 1);
  assert.equal(store.get(chat.id), chat);
});

test("a store reads another's data and ignores invalid values", () => {
  const storage = new MemoryStorage();
  const chat = chatOf("a");
  new Store(storage).save(chat);
  storage.setItem("bumblebee.conversation.broken", "{");
  storage.setItem("another.program", "x");
  assert.deepEqual(new Store(storage).list().map(({ id }) => id), [chat.id]);
  assert.equal(storage.getItem("bumblebee.conversation.broken"), "{");
});

test("tokens are those of the last usage plus later answers", () => {
  const stats = (more) => ({ ...newMessage("assistant", "x"), stats: more });
  const { messages } = chatOf("a");
  assert.equal(tokensOf({ messages }), 0);
  messages.push(stats({ prompt: 10, tokens: 5 }));
  assert.equal(tokensOf({ messages }), 15);
  messages.push(newMessage("user", "b"), stats({ tokens: 3 }));
  assert.equal(tokensOf({ messages }), 18);
});

test("an error keeps the server's message and Retry-After", async () => {
  const json = (status, error, headers) => new Response(JSON.stringify({ error }), { status, headers });
  const busy = await failureOf(json(429, { message: "later" }, { "retry-after": "7" }));
  assert.deepEqual([busy.kind, busy.message, busy.retryAfter], ["busy", "later", 7]);
  const long = await failureOf(json(400, { message: "300 > 256", code: "context_length_exceeded" }));
  assert.deepEqual([long.kind, long.message], ["too_long", "300 > 256"]);
  assert.equal((await failureOf(new Response("<html>", { status: 500 }))).kind, "server");
  const date = new Date(Date.now() + 5000).toUTCString();
  const later = (await failureOf(json(503, {}, { "retry-after": date }))).retryAfter;
  assert.ok(later >= 4 && later <= 5);
});
