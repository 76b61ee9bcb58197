#!/usr/bin/env node
/**
 * Draws pictures with a Headwater sampler and shows on standard error how far it is.
 *
 * Exit codes: 0 drawn, 1 refused or failed, 2 wrong usage, 3 cancelled by --cancel-after-steps, 130 interrupted.
 */
import { createHash } from "node:crypto";
import { open, rename, rm, stat } from "node:fs/promises";
import { connect as connectSocket } from "node:net";
import { basename, dirname, extname, join } from "node:path";
import { parseArgs } from "node:util";

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { type Duration, durationMs } from "@bufbuild/protobuf/wkt";
import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";

import { Code as StatusCode } from "./gen/google/rpc/code_pb.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";
import {
  type Finished,
  type GenerateRequest,
  GenerateRequestSchema,
  type GenerateResponse,
  type ImageChunk,
  type ImageSummary,
  Phase,
  type Progress,
  type Queued,
  SamplerService,
} from "./gen/headwater/sampler/v1/sampler_pb.js";

const EXIT = { drawn: 0, failed: 1, usage: 2, cancelled: 3, interrupted: 130 } as const;

const USAGE = `usage: headwater-ts generate --address HOST:PORT|unix:/path --prompt TEXT -o FILE [options]
  --model NAME             name of the model (default: the only one)
  --width, --height PIXELS size (default: the model's)
  --steps NUMBER           denoise steps (default: the model's)
  --seed NUMBER            what picture 0 starts from (default: the sampler chooses)
  --count NUMBER           how many pictures, in numbered files (default 1)
  --cancel-after-steps N   cancel the call after this number of steps, exit 3
  --timeout SECONDS        give up after so long (default: never)`;

interface Options {
  readonly address: string;
  readonly output: string;
  readonly cancelAfterSteps?: number | undefined;
  readonly timeoutMs?: number | undefined;
  readonly request: GenerateRequest;
}

/** One encoded file as the sampler sent it. */
interface Picture {
  readonly data: Buffer;
  readonly summary: ImageSummary;
}

interface Drawing {
  readonly pictures: readonly Picture[];
  readonly finished: Finished;
}

class UsageError extends Error {}

/** Ends a call that --cancel-after-steps cancelled. */
class EnoughSteps extends Error {
  override readonly message = "cancelled after the asked number of steps";
}

async function main(): Promise<number> {
  const interrupt = new AbortController();
  // Once: a second Ctrl-C ends the program at once.
  process.once("SIGINT", () => interrupt.abort());
  try {
    await generate(parseOptions(process.argv.slice(2)), interrupt.signal);
    return EXIT.drawn;
  } catch (error) {
    if (error instanceof UsageError) {
      console.error(`headwater-ts: ${error.message}\n${USAGE}`);
      return EXIT.usage;
    }
    if (interrupt.signal.aborted && isCancelled(error)) {
      console.error("headwater-ts: interrupted");
      return EXIT.interrupted;
    }
    console.error(`headwater-ts: ${describe(error)}`);
    return error instanceof EnoughSteps ? EXIT.cancelled : EXIT.failed;
  }
}

/** Draws what `options` asks for. Writes files only once the whole call has succeeded. */
async function generate(options: Options, interrupted: AbortSignal): Promise<void> {
  await stat(dirname(options.output)); // before a slip of the pen costs a drawing
  const sessions = openSessions(options.address);
  const transport = createGrpcTransport({ baseUrl: sessions.authority, sessionManager: sessions });
  const display = new Display(process.stderr);
  try {
    const { pictures, finished } = await draw(createClient(SamplerService, transport), options, interrupted, display);
    display.clear();
    await save(pictures, options.output);
    console.log(costLine(finished));
  } catch (error) {
    const lost = isConnectionLost(error, sessions);
    sessions.abort(); // a stream that was left before its end would keep the program running
    throw lost ? new ConnectError(error.rawMessage, Code.Unavailable) : error;
  } finally {
    display.clear();
  }
}

/** HTTP/2 without TLS, to a host and port or through a Unix socket. */
function openSessions(address: string): Http2SessionManager {
  const socketPath = /^unix:(?:\/\/)?(.+)$/.exec(address)?.[1];
  if (socketPath === undefined) {
    return new Http2SessionManager(`http://${address}`);
  }
  return new Http2SessionManager("http://localhost", undefined, { createConnection: () => connectSocket(socketPath) });
}

/** Follows one call to its end and returns what came of it, checked. */
async function draw(
  client: Client<typeof SamplerService>,
  { request, timeoutMs, cancelAfterSteps = Infinity }: Options,
  interrupted: AbortSignal,
  display: Display,
): Promise<Drawing> {
  const enough = new AbortController();
  const signal = AbortSignal.any([interrupted, enough.signal]);
  const drawing = new DrawingSoFar();
  try {
    for await (const response of client.generate(request, { signal, timeoutMs })) {
      display.show(newsLine(response, request.count || 1));
      drawing.take(response);
      if (drawing.stepCount >= cancelAfterSteps) {
        enough.abort(); // and read on: the stream itself says how it ended
      }
    }
  } catch (error) {
    throw enough.signal.aborted && isCancelled(error) ? new EnoughSteps() : error;
  }
  return drawing.close();
}

/** What a stream has brought. Pictures arrive one after the other, so one list of parts is enough. */
class DrawingSoFar {
  stepCount = 0;
  readonly #pictures: Picture[] = [];
  #parts: Uint8Array[] = [];
  #finished: Finished | undefined;

  take({ event }: GenerateResponse): void {
    switch (event.case) {
      case "progress":
        this.stepCount += isStep(event.value) ? 1 : 0;
        break;
      case "imageChunk":
        this.#add(event.value);
        break;
      case "finished":
        this.#finished = event.value;
        break;
    }
  }

  /** Refuses an OK stream that did not bring everything it promised. */
  close(): Drawing {
    if (this.#finished === undefined) {
      throw new Error("the stream ended without its last message");
    }
    const drawn = this.#finished.seeds.length;
    if (this.#pictures.length !== drawn || this.#parts.length > 0) {
      throw new Error(`${this.#pictures.length} whole pictures came, the sampler drew ${drawn}`);
    }
    return { pictures: this.#pictures, finished: this.#finished };
  }

  #add({ imageIndex, data, last }: ImageChunk): void {
    if (imageIndex !== this.#pictures.length) {
      throw new Error(`a chunk of picture ${imageIndex} came while picture ${this.#pictures.length} was open`);
    }
    this.#parts.push(data);
    if (last !== undefined) {
      this.#pictures.push(checked(imageIndex, Buffer.concat(this.#parts), last));
      this.#parts = [];
    }
  }
}

/** Tells a finished step from the news that denoising begins. */
function isStep(progress: Progress): boolean {
  return progress.phase === Phase.DENOISING && progress.step > 0;
}

function checked(index: number, data: Buffer, summary: ImageSummary): Picture {
  if (BigInt(data.length) !== summary.sizeBytes) {
    throw new Error(`picture ${index} has ${data.length} bytes, the sampler announced ${summary.sizeBytes}`);
  }
  if (!createHash("sha256").update(data).digest().equals(summary.sha256)) {
    throw new Error(`picture ${index} was damaged on its way: its SHA-256 differs`);
  }
  return { data, summary };
}

/** Rewrites one line of a terminal; anywhere else, each change is a line of its own. */
class Display {
  static readonly #eraseLine = "\r\x1b[K";
  readonly #stream: NodeJS.WriteStream;

  constructor(stream: NodeJS.WriteStream) {
    this.#stream = stream;
  }

  show(line: string | undefined): void {
    if (line === undefined) {
      return;
    }
    this.#stream.write(this.#stream.isTTY ? Display.#eraseLine + line : `${line}\n`);
  }

  clear(): void {
    if (this.#stream.isTTY) {
      this.#stream.write(Display.#eraseLine);
    }
  }
}

/** What a message means to someone who waits, if anything. */
function newsLine({ event }: GenerateResponse, pictureCount: number): string | undefined {
  switch (event.case) {
    case "queued":
      return queuedLine(event.value);
    case "started":
      return `started: ${event.value.model} on ${event.value.replica}`;
    case "progress":
      return progressLine(event.value, pictureCount);
    default:
      return undefined;
  }
}

function queuedLine({ position, estimate }: Queued): string {
  const line = `queued: ${position} before this request`;
  return estimate === undefined ? line : `${line}, about ${(durationMs(estimate) / 1000).toFixed(1)} s`;
}

function progressLine(progress: Progress, pictureCount: number): string {
  const phase = Phase[progress.phase]?.toLowerCase() ?? "busy";
  return `picture ${progress.imageIndex + 1}/${pictureCount}: ${phase}${progressDetail(progress)}`;
}

function progressDetail({ phase, step, stepCount, readyBytes, totalBytes }: Progress): string {
  switch (phase) {
    case Phase.PREPARING:
      return `, ${mebibytes(readyBytes)} of ${mebibytes(totalBytes)}`;
    case Phase.DENOISING:
      return `, step ${step}/${stepCount}`;
    default:
      return "";
  }
}

function costLine({ queueTime, runTime, stallTime, streamedBytes }: Finished): string {
  const queued = `queued ${seconds(queueTime)} s, ran ${seconds(runTime)} s`;
  return `${queued}, waited ${seconds(stallTime)} s for params, streamed ${mebibytes(streamedBytes)}`;
}

function seconds(duration: Duration | undefined): string {
  return ((duration === undefined ? 0 : durationMs(duration)) / 1000).toFixed(2);
}

function mebibytes(count: bigint): string {
  return `${(Number(count) / 2 ** 20).toFixed(1)} MiB`;
}

function isCancelled(error: unknown): boolean {
  return error instanceof ConnectError && error.code === Code.Canceled;
}

/**
 * Whether the connection, not the sampler, ended the call. gRPC calls that UNAVAILABLE; connect-node calls it INTERNAL,
 * ABORTED or even CANCELLED, by how the connection went.
 */
function isConnectionLost(error: unknown, sessions: Http2SessionManager): error is ConnectError {
  const lost = ["closed", "error"].includes(sessions.state());
  return lost && error instanceof ConnectError && !error.metadata.has("grpc-status");
}

/** An error on one line; for a server's status: code, reason, what to mend and when to come back. */
function describe(error: unknown): string {
  if (!(error instanceof ConnectError)) {
    return oneLine(error instanceof Error ? error.message : String(error));
  }
  const [info] = error.findDetails(ErrorInfoSchema);
  const [bad] = error.findDetails(BadRequestSchema);
  const [retry] = error.findDetails(RetryInfoSchema);
  const title = [StatusCode[error.code], info?.reason].filter(Boolean).join(" ");
  const text = bad?.fieldViolations.map(({ field, description }) => `${field}: ${description}`).join("; ");
  const hint = retry?.retryDelay === undefined ? "" : ` (try again in ${seconds(retry.retryDelay)} s)`;
  return oneLine(`${title}: ${text ?? error.rawMessage}${hint}`);
}

function oneLine(text: string): string {
  return text.trim().replace(/\s+/g, " ");
}

async function save(pictures: readonly Picture[], output: string): Promise<void> {
  for (const [index, { data, summary }] of pictures.entries()) {
    const path = outputPath(output, index, pictures.length);
    await writeAtomically(path, data);
    console.log(`${path}: ${summary.widthPx}x${summary.heightPx}, seed ${summary.seed}`);
  }
}

/** Numbers the files when there are several: out.png becomes out-0.png, out-1.png, ... */
function outputPath(path: string, index: number, count: number): string {
  if (count === 1) {
    return path;
  }
  const extension = extname(path);
  return join(dirname(path), `${basename(path, extension)}-${index}${extension}`);
}

/** Leaves either the whole file or what was there before, also when the machine stops half-way. */
async function writeAtomically(path: string, data: Buffer): Promise<void> {
  const partial = join(dirname(path), `.${basename(path)}.${process.pid}`);
  try {
    const file = await open(partial, "wx");
    try {
      await file.writeFile(data);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(partial, path);
  } finally {
    await rm(partial, { force: true }); // finds nothing once the file has its name
  }
}

/** Reads the command line; throws UsageError. */
function parseOptions(args: string[]): Options {
  const { values, positionals } = readArguments(args);
  const { address, prompt, output } = values;
  if (positionals.length !== 1 || positionals[0] !== "generate") {
    throw new UsageError("the only command is generate");
  }
  // An empty prompt is not missing: whether it will do is the sampler's to say.
  if (!address || prompt === undefined || !output) {
    throw new UsageError("--address, --prompt and -o are required");
  }
  const request: MessageInitShape<typeof GenerateRequestSchema> = {
    prompt,
    model: values.model,
    widthPx: int32("width", values.width),
    heightPx: int32("height", values.height),
    stepCount: int32("steps", values.steps),
    count: int32("count", values.count),
    seed: int64("seed", values.seed),
  };
  return {
    address,
    output,
    cancelAfterSteps: int32("cancel-after-steps", values["cancel-after-steps"]) || undefined, // 0: never
    timeoutMs: milliseconds("timeout", values.timeout),
    request: create(GenerateRequestSchema, request),
  };
}

function readArguments(args: string[]) {
  try {
    return parseArgs({
      args,
      allowPositionals: true,
      options: {
        address: { type: "string" },
        prompt: { type: "string" },
        output: { type: "string", short: "o" },
        model: { type: "string" },
        width: { type: "string" },
        height: { type: "string" },
        steps: { type: "string" },
        seed: { type: "string" },
        count: { type: "string" },
        "cancel-after-steps": { type: "string" },
        timeout: { type: "string" },
      },
    });
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error));
  }
}

function int32(name: string, text: string | undefined): number | undefined {
  const value = int64(name, text);
  if (value !== undefined && value !== BigInt.asIntN(32, value)) {
    throw new UsageError(`--${name} is out of range: ${text}`);
  }
  return value === undefined ? undefined : Number(value);
}

function int64(name: string, text: string | undefined): bigint | undefined {
  if (text === undefined) {
    return undefined;
  }
  if (!/^-?\d+$/.test(text) || BigInt(text) !== BigInt.asIntN(64, BigInt(text))) {
    throw new UsageError(`--${name} takes a whole number, not ${text}`);
  }
  return BigInt(text);
}

function milliseconds(name: string, text: string | undefined): number | undefined {
  if (text === undefined) {
    return undefined;
  }
  const value = Number(text) * 1000;
  if (!(value > 0 && Number.isFinite(value))) {
    throw new UsageError(`--${name} takes a number of seconds above 0, not ${text}`);
  }
  return value;
}

process.exitCode = await main();
