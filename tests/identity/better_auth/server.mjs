// A real Better Auth for tests: on the database in DATABASE_URL, with HS256 where SHARED_SECRET is set, else with EdDSA.
// Prints its address as one line of JSON, and ends with its standard input.
import { createServer } from "node:http";

import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";
import { SignJWT } from "jose";
import pg from "pg";

let handler;
const server = createServer((request, response) => handler(request, response));
await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
const url = `http://127.0.0.1:${server.address().port}`;

const secret = process.env.SHARED_SECRET;
const shared = secret && {
  // Its JWKS has nothing for a shared secret: it says that keys are elsewhere, and lets a function of ours sign.
  jwks: { remoteUrl: `${url}/none`, keyPairConfig: { alg: "ES256" } },
  jwt: {
    sign: (payload) => new SignJWT(payload).setProtectedHeader({ alg: "HS256" }).sign(new TextEncoder().encode(secret)),
  },
};

const options = {
  baseURL: url,
  secret: "only for tests, and thirty-two bytes long",
  database: new pg.Pool({ connectionString: process.env.DATABASE_URL }),
  emailAndPassword: { enabled: true },
  telemetry: { enabled: false },
  rateLimit: { enabled: false },
  plugins: [jwt(shared || { jwks: { rotationInterval: 3600 } })],
};
await (await getMigrations(options)).runMigrations();
handler = toNodeHandler(betterAuth(options));
console.log(JSON.stringify({ url }));

process.stdin.resume().on("end", () => process.exit(0));
