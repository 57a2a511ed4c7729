-- Creates a namespace. The first 17 bytes of a record are VM and purpose.
--
-- Keys: store, spaces, forgotten, space. Arguments: clock offset, id, record, lease, random value,
-- most namespaces.
local at = now(ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', at)
if redis.call('ZSCORE', KEYS[3], ARGV[2]) then return { 'forgotten' } end
local record = redis.call('HGET', KEYS[4], 'record')
local lease = tonumber(ARGV[4])
local ends = at + lease
if record then
  if string.sub(record, 1, 17) ~= string.sub(ARGV[3], 1, 17) then return { 'occupied' } end
  lease = math.max(lease, tonumber(redis.call('HGET', KEYS[4], 'lease') or '0'))
  ends = math.max(ends, tonumber(redis.call('ZSCORE', KEYS[2], ARGV[2]) or '0'))
else
  if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[6]) then return { 'many' } end
  redis.call('HSET', KEYS[4], 'record', ARGV[3])
end
redis.call('HSET', KEYS[4], 'lease', string.format('%.0f', lease))
redis.call('ZADD', KEYS[2], string.format('%.0f', ends), ARGV[2])
redis.call('SETNX', KEYS[1], ARGV[5])
return { 'ok', redis.call('GET', KEYS[1]) }
