-- What a database does: inserts, indices, joins, sorting, text.
CREATE TABLE person (id INTEGER PRIMARY KEY, name TEXT, town INTEGER, born REAL);
CREATE TABLE town (id INTEGER PRIMARY KEY, name TEXT);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500)
  INSERT INTO town SELECT i, printf('town %04x', i * 2654435761 % 65536) FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
  INSERT INTO person SELECT i, hex(i * 2654435761 % 4294967296), i * 48271 % 500 + 1, 1900 + i * 16807 % 100000 / 1000.0 FROM n;
COMMIT;
CREATE INDEX by_name ON person (name);
CREATE INDEX by_town ON person (town, born);
SELECT town.name, count(*), round(avg(born), 6), min(person.name) FROM person JOIN town ON town.id = town
  GROUP BY town ORDER BY 3 DESC, 1 LIMIT 20;
SELECT count(*) FROM person a JOIN person b ON a.town = b.town AND b.born BETWEEN a.born AND a.born + 1.5;
SELECT count(*), sum(length(replace(name, 'A', 'xyz'))) FROM person WHERE name LIKE '%A%F%';
UPDATE person SET name = lower(name) || town WHERE id % 3 = 0;
DELETE FROM person WHERE born > 1990;
SELECT count(DISTINCT substr(name, 1, 3)), group_concat(DISTINCT substr(name, 1, 1)) FROM (SELECT name FROM person ORDER BY name);
