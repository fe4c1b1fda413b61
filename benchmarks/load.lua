-- Requests for wrk, each of texts that no request had before: rows of a file in turn, a number behind each.
-- Arguments: FILE (JSON strings, one a line), KEY of the texts in the body, REST of the body, COUNT of texts a request (0:
-- a single text, not a list), FIRST number, RATE of requests a second (0: each connection as fast as it is answered).
--
-- With a rate, requests are due at random moments (a Poisson process), whatever became of those before: a connection
-- that is free waits for the next moment that is due. As long as one is free requests go out on time, so that a slow
-- answer does not hold back, and hide, those behind it. The moments that were missed are counted.
local ffi = require("ffi")
ffi.cdef("typedef struct { long seconds; long nanoseconds; } moment; int clock_gettime(int clock, moment *now);")

local threads, now = {}, ffi.new("moment")
local texts, key, rest, count, number, rate, due = {}
missed, due_count = 0, 0 -- global: read from outside by done()

local function seconds()
  ffi.C.clock_gettime(1, now) -- CLOCK_MONOTONIC
  return tonumber(now.seconds) + tonumber(now.nanoseconds) / 1e9
end

function setup(thread)
  table.insert(threads, thread)
end

function init(arguments)
  for line in io.lines(arguments[1]) do
    texts[#texts + 1] = line:sub(1, -2) -- without the closing quote
  end
  key, rest, count = arguments[2], arguments[3], tonumber(arguments[4])
  number, rate = tonumber(arguments[5]), tonumber(arguments[6])
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  math.randomseed(number)
  if rate > 0 then
    delay = wait
  end
end

function wait()
  local at = seconds()
  due = (due or at) - math.log(1 - math.random()) / rate
  due_count = due_count + 1
  if due < at - 0.005 then
    missed = missed + 1
  end
  return math.max(0, math.floor((due - at) * 1000 + 0.5))
end

local function fresh()
  number = number + 1
  return texts[number % #texts + 1] .. " " .. number .. '"'
end

function request()
  local found = {}
  for i = 1, math.max(1, count) do
    found[i] = fresh()
  end
  local inputs = table.concat(found, ", ")
  if count > 0 then
    inputs = "[" .. inputs .. "]"
  end
  return wrk.format(nil, nil, nil, '{"' .. key .. '": ' .. inputs .. rest .. "}")
end

function done(summary, latency)
  local late, all = 0, 0
  for _, thread in ipairs(threads) do
    late, all = late + thread:get("missed"), all + thread:get("due_count")
  end
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests": %d, "seconds": %f, "median": %f, "p99": %f, "most": %f, "refused": %d, "lost": %d, "missed": %f}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    all > 0 and late / all or 0))
end
